"""What callers pass, turned into host arrays and checked: one clear ValueError for each mistake."""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from qwen_jax import texts


def ids(name: str, values: Any) -> list[int]:
    """Whole numbers, out of any sequence or array of one axis. ValueError that names the argument
    for anything else: a float may be a number's rounding, and a text is no ids.
    """
    try:
        if isinstance(values, str | bytes | bytearray):
            raise TypeError
        return list(map(operator.index, values))
    except TypeError:
        got = texts.described(values)
        raise ValueError(f"{name} must be whole numbers (token ids), got {got}") from None


def rows(tokens: Any, mask: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, T] and the number of real tokens of each row, checked."""
    try:
        tokens = np.asarray(tokens)
    except ValueError:
        raise ValueError(
            "tokens: rows of one length [B, T]; pad on the left and pass mask"
        ) from None
    if tokens.size == 0:
        raise ValueError("empty prompt: every row needs at least one token")
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B, T], not {tokens.dtype} {tokens.shape}")
    mask = np.ones(tokens.shape, bool) if mask is None else _mask(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens {tokens.shape}")
    lengths = mask.sum(axis=1)
    if not lengths.all():
        raise ValueError("empty prompt: every row needs at least one token")
    if (np.diff(mask.astype(np.int8), axis=1) < 0).any():
        raise ValueError("mask: rows must be padded on the left")
    tokens = np.where(mask, tokens, 0)
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ValueError(f"token id {bad[0]} is out of range: 0 to {vocab_size - 1}")
    return tokens.astype(np.int32), lengths


def _mask(given: Any) -> np.ndarray:
    """bool of any shape. ValueError for what is no array of 0 and 1."""
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


def alphas(ntk_alpha: Any, rows: int) -> np.ndarray:
    """float64 [rows]: one NTK alpha for all rows, or one for each."""
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


def stops(stop: Any, vocab_size: int) -> list[tuple[int, ...]]:
    """Ids, or sequences of ids, as sequences."""
    if isinstance(stop, str | bytes | bytearray) or not isinstance(stop, Iterable):
        raise ValueError(f"stop {stop!r}: must be a sequence of ids, or of sequences of ids")
    try:
        sequences = [np.atleast_1d(np.asarray(ids)) for ids in stop]
    except ValueError:  # a sequence of ids among ids
        raise ValueError(f"stop {stop!r}: must be ids, or sequences of ids") from None
    for ids in sequences:
        whole = ids.ndim == 1 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
        if not whole or not ((ids >= 0) & (ids < vocab_size)).all():
            raise ValueError(
                f"stop {ids.tolist()}: ids are whole numbers from 0 to {vocab_size - 1}"
            )
    return [tuple(ids.tolist()) for ids in sequences]


def seeds(seed: Any, batch: int) -> np.ndarray:
    """uint32 [batch]: one seed for all rows, or one for each; they are taken modulo 2**32."""
    alone = not isinstance(seed, Iterable) or getattr(seed, "ndim", 1) == 0
    given: list[Any] = [seed] if alone else list(seed)
    if len(given) not in (1, batch):
        raise ValueError(f"seed: {len(given)} numbers for {batch} rows: give one, or one a row")
    wrapped = [_seed(one) % 2**32 for one in given]
    return np.broadcast_to(np.array(wrapped, np.uint32), (batch,))


def _seed(value: Any) -> int:
    """A whole number as Python's own."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"seed {value!r}: must be a whole number")
    return value
