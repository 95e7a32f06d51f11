"""Checks callers' arguments and makes host arrays of them: token ids, masks, stops, seeds, alphas.

Each mistake raises a ValueError of one line that names the argument, its value and the allowed
values.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt32
from numpy.typing import ArrayLike

from qwen_jax.runtime import texts, values

Tokens = ArrayLike | Sequence[ArrayLike]  # ids [B, T], or rows of unequal length
Stops = Sequence[int] | Sequence[Sequence[int]]  # ids, or sequences of ids, that end a row


def rows(
    tokens: Tokens, mask: ArrayLike | None, *, vocab_size: int
) -> tuple[Int32[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Check prompts; return them as int32 [B, T], left-padded with 0, and their lengths, [B].

    tokens: the token ids of each prompt; prompts of unequal length are padded here.
    mask: [B, T], 1 where a token is real, for prompts of one length that are padded already; or
        None.
    vocab_size: one more than the largest allowed id.
    """
    _refuse_text(tokens)
    given, ragged = _array(tokens)
    if ragged:
        if mask is not None:
            raise ValueError("mask: rows of unequal length are padded on the left here: drop it")
        return _padded(given, vocab_size)
    if given.size == 0:
        raise ValueError("empty prompt: every row needs at least one token")
    if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers [B, T], not {given.dtype} {given.shape}: ids of one prompt "
            "are [ids]"
        )
    mask = np.ones(given.shape, bool) if mask is None else _mask(mask)
    if mask.shape != given.shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens {given.shape}")
    lengths = mask.sum(axis=1)
    if not lengths.all():
        raise ValueError("empty prompt: every row needs at least one token")
    if (np.diff(mask.astype(np.int8), axis=1) < 0).any():
        raise ValueError("mask: rows must be padded on the left")
    given = np.where(mask, given, 0)
    bad = given[(given < 0) | (given >= vocab_size)]
    if bad.size:
        raise ValueError(f"token id {bad[0]} is out of range: 0 to {vocab_size - 1}")
    return given.astype(np.int32), lengths


def _array(tokens: Any) -> tuple[Any, bool]:
    """Return prompts as (an array, False), or if their lengths differ as (a list, True)."""
    try:
        found = np.asarray(tokens)
    except ValueError:
        return list(tokens), True
    if found.dtype == object and found.ndim == 1:  # rows that numpy keeps as they are
        return list(found), True
    return found, False


def _padded(
    given: list[Any], vocab_size: int
) -> tuple[Int32[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Pad prompts of unequal length on the left with 0; return int32 [B, T] and the lengths, [B].

    given: the token ids of each prompt.
    vocab_size: one more than the largest allowed id.
    """
    each = [
        values.ids(f"tokens, row {row}", one, below=vocab_size) for row, one in enumerate(given)
    ]
    lengths = np.array([len(row) for row in each])
    if not lengths.all():
        raise ValueError("empty prompt: every row needs at least one token")
    tokens = np.zeros((len(each), lengths.max()), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, -length:] = each[row]
    return tokens, lengths


def _refuse_text(tokens: object) -> None:
    """Raise ValueError if tokens are texts or messages, and name the method that takes these."""
    first = tokens
    if isinstance(tokens, list | tuple | np.ndarray) and len(tokens):
        first = tokens[0]
    if isinstance(first, Mapping):
        raise ValueError("tokens must be token ids, got messages: model.chat(query, history) is it")
    if isinstance(first, str | bytes | bytearray):
        shown = texts.shown(first)
        raise ValueError(
            f"tokens must be token ids, got text {shown}: model.generate_text(prompts) takes "
            "texts, model.chat(query) asks a chat model, and model.tokenizer.encode(text) makes ids"
        )


def _mask(given: ArrayLike) -> Bool[np.ndarray, "..."]:
    """Return a mask as a bool array. Raises ValueError unless it holds only 0 and 1."""
    try:
        mask = np.asarray(given)
        if not np.isin(mask, (0, 1)).all() or mask.dtype.kind not in "biuf":
            raise ValueError
    except (TypeError, ValueError):
        got = texts.described(given)
        raise ValueError(
            f"mask must be 0 (padding) or 1 for each token, rows of one length, got {got}"
        ) from None
    return mask.astype(bool)


def alphas(ntk_alpha: ArrayLike, rows: int) -> Float[np.ndarray, " {rows}"]:
    """Return each sequence's NTK alpha, float64 [rows], from one number or one per sequence."""
    try:
        found = np.asarray(ntk_alpha)
        if found.dtype.kind in "bcSUOMm" or found.shape not in ((), (rows,)):
            raise ValueError
        return np.broadcast_to(found.astype(np.float64), rows)
    except (TypeError, ValueError):
        got = texts.described(ntk_alpha)
        raise ValueError(
            f"ntk_alpha must be a number of at least 1, or one for each of {rows} rows, got {got}"
        ) from None


def stops(stop: Stops, vocab_size: int) -> list[tuple[int, ...]]:
    """Check stops, given as token ids or sequences of ids, and return each as a tuple of ids.

    vocab_size: one more than the largest allowed id.
    """
    words = isinstance(stop, str | bytes | bytearray | memoryview | Mapping)
    given = [] if words or not isinstance(stop, Iterable) else list(stop)
    hint = ""
    if isinstance(stop, str) or any(isinstance(each, str) for each in given):
        hint = "; model.generate_text(prompts, stop=...) takes texts"
    if hint or words or not isinstance(stop, Iterable):
        shown = texts.shown(stop)
        raise ValueError(f"stop {shown}: must be a sequence of ids, or of sequences of ids{hint}")
    found = []
    for each in given:
        several = isinstance(each, Iterable) and getattr(each, "ndim", 1)
        found.append(tuple(values.ids("stop", each if several else [each], below=vocab_size)))
        if not found[-1]:
            raise ValueError(f"stop {texts.shown(stop)}: an empty sequence ends nothing: drop it")
    return found


def seeds(seed: Any, batch: int) -> UInt32[np.ndarray, " B"]:
    """Return each sequence's seed, uint32 [batch], modulo 2**32, from one number or one each."""
    several = isinstance(seed, Iterable) and not isinstance(seed, values.NO_SEQUENCE)
    given = list(seed) if several and getattr(seed, "ndim", 1) else [seed]
    if len(given) not in (1, batch):
        raise ValueError(f"seed: {len(given)} numbers for {batch} rows: give one, or one a row")
    wrapped = [values.whole("seed", one) % 2**32 for one in given]
    return np.broadcast_to(np.array(wrapped, np.uint32), (batch,))


def prompts(given: Iterable[str]) -> list[Any]:
    """Return several prompts as a list. Its caller checks that each item is a text.

    Raises ValueError if they are token ids or chat messages, and names the method to call instead.
    """
    if isinstance(given, bytes | bytearray | Mapping | Set) or not isinstance(given, Iterable):
        raise ValueError(f"prompts must be a text, or texts, got {texts.described(given)}")
    found = list(given)
    if not found:
        raise ValueError("prompts: there is none: give a text, or texts")
    if any(isinstance(one, Mapping) for one in found):
        raise ValueError("prompts must be texts, got messages: model.chat(query, history) is it")
    if not any(isinstance(one, str | bytes | bytearray) for one in found):
        raise ValueError(
            f"prompts must be texts, got {texts.described(found[0])}: model.generate(tokens) takes "
            "token ids"
        )
    return found
