"""Chooses how the integers of a quantised model directory are multiplied by.

They become floats when they are loaded, or a kernel reads them (`integer_products.py`).
"""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen_jax import checkpoint
from qwen_jax.checkpoint.kinds import GROUPED
from qwen_jax.config import Config
from qwen_jax.generate import integer_products
from qwen_jax.leaves import grouped, int8
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weights import Leaf, Weight
from qwen_jax.runtime import memory

_SHARE = 0.5  # of a machine's memory that floats may take without being asked for
Converter = Callable[[str, Weight | Leaf], Weight | Leaf]


def converter(
    path: str | Path, config: Config, *, dtype: str, dequantise: bool | None
) -> Converter | None:
    """Return the function that prepares each weight of a directory; None if all are floats.

    path, config: the model directory, and its architecture.
    dtype: the dtype in which the model computes.
    dequantise: whether integers become floats of it; None chooses, and says in a line of the log
        what it chose.

    Raises ValueError if that is asked for, and the weights are floats already.
    """
    found = _bits(path)
    if not found:
        if dequantise is not None:
            raise ValueError(f"dequantise {dequantise}: {path} is not quantised: leave it out")
        return None
    if dequantise is None:
        dequantise = _chosen(path, config, dtype=dtype)
    if dequantise:
        return lambda _, leaf: grouped.plain(leaf, dtype) if isinstance(leaf, Grouped) else leaf
    return _with(found, dtype)


def for_passes(path: str | Path, dtype: str) -> Converter:
    """Return the function that prepares each weight of a directory for passes over many tokens.

    It is for training and measuring, and gives integers in groups the kernel of this device; not on
    a CPU, where such passes are faster with floats of a weight that are made for each product. A
    head in int8 becomes floats, as a loss reads it by its rows.

    path, dtype: as for `converter`.
    """
    found = [] if jax.default_backend() == "cpu" else _bits(path)
    with_kernel = _with(found, dtype)

    def prepared(name: str, leaf: Weight | Leaf) -> Weight | Leaf:
        if name == "head" and isinstance(leaf, Int8):
            return int8.plain(leaf, dtype)
        return with_kernel(name, leaf)

    return prepared


def _bits(path: str | Path) -> list[int]:
    """Return the widths of the integers in groups of a model directory, in ascending order."""
    found = set(checkpoint.load_kinds(path).values())
    return sorted(bits for kind, bits in GROUPED.items() if kind in found)


def _with(widths: list[int], dtype: str) -> Converter:
    """Return the function that gives integers of these widths their kernels, where one is right.

    Integers of other widths stay as they are.
    """
    kernels = {bits: integer_products.settled(bits, dtype) for bits in widths}

    def prepared(_: str, leaf: Weight | Leaf) -> Weight | Leaf:
        if not isinstance(leaf, Grouped) or (kernel := kernels.get(leaf.bits)) is None:
            return leaf
        return grouped.for_kernel(leaf, kernel)

    return prepared


def _chosen(path: str | Path, config: Config, *, dtype: str) -> bool:
    """Return whether integers become floats on this machine, and say so if it is a CPU."""
    if jax.default_backend() != "cpu":
        return False
    needed = config.num_params() * jnp.dtype(dtype).itemsize
    there = memory.usable()
    fits = needed <= _SHARE * there
    size = f"{needed / 1e9:.1f} GB of {there / 1e9:.1f}"
    if fits:
        line = f"its integers become {dtype} ({size}), which a CPU multiplies faster"
    else:
        line = f"its integers are kept: {dtype} would take {size}; a CPU is slower with them"
    other = "keeps them" if fits else "turns them into floats"
    logging.getLogger("qwen_jax").info(
        "%s: %s; dequantise=%s (--%sdequantise) %s",
        path,
        line,
        not fits,
        "no-" if fits else "",
        other,
    )
    return fits
