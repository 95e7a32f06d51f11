"""Callers' arguments as checked host arrays: token ids, masks, stops, seeds and NTK alphas.

Each mistake raises a ValueError of one line that names the argument, its value and what is allowed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwen_jax.runtime import texts, values


def rows(tokens: Any, mask: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Check prompts and return them as int32 [B, T], with the number of real tokens in each row,
    [B].

    vocab_size: one more than the largest allowed id.
    """
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


def alphas(ntk_alpha: Any, rows: int) -> np.ndarray:
    """Return the NTK alpha of each row, float64 [rows], from one number or one for each row."""
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
    """Return stops as sequences of ids, from ids or sequences of ids."""
    words = isinstance(stop, str | bytes | bytearray | memoryview | Mapping)
    if words or not isinstance(stop, Iterable):
        shown = texts.shown(stop)
        raise ValueError(f"stop {shown}: must be a sequence of ids, or of sequences of ids")
    found = []
    for each in stop:
        several = isinstance(each, Iterable) and getattr(each, "ndim", 1)
        found.append(tuple(values.ids("stop", each if several else [each], vocab_size)))
        if not found[-1]:
            raise ValueError(f"stop {texts.shown(stop)}: an empty sequence ends nothing: drop it")
    return found


def seeds(seed: Any, batch: int) -> np.ndarray:
    """Return the seed of each row, uint32 [batch], modulo 2**32, from one number or one for each
    row.
    """
    several = isinstance(seed, Iterable) and not isinstance(seed, values.NO_SEQUENCE)
    given = list(seed) if several and getattr(seed, "ndim", 1) else [seed]
    if len(given) not in (1, batch):
        raise ValueError(f"seed: {len(given)} numbers for {batch} rows: give one, or one a row")
    wrapped = [values.whole("seed", one) % 2**32 for one in given]
    return np.broadcast_to(np.array(wrapped, np.uint32), (batch,))
