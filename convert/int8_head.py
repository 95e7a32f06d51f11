"""The head of a checkpoint in 8 bits, with a scale for each row (`leaves.int8`).

The head is a quarter to a half of the bytes of a model whose layers have 4 bits.
"""

import functools
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from convert import copying
from convert.gptq_import import Array, Quantised
from convert.names import Expected
from qwen_jax.checkpoint import kinds
from qwen_jax.checkpoint.safetensors_header import Tensor
from qwen_jax.runtime import paths

TENSOR, LEAF = "lm_head.weight", "head"
_LARGEST = 127


def add(plan: Quantised, tensor: Tensor | None) -> None:
    """Have the head of a checkpoint rounded to 8 bits.

    plan: what is made of the checkpoint, to which the head is added.
    tensor: the location of the head; None for a model without one.

    Raises ValueError for a model whose head is its embedding.
    """
    if tensor is None:
        raise ValueError(
            "head int8: this model has no head of its own, its embedding is the head: leave it out"
        )
    plan.wanted[TENSOR] = Expected(tensor.shape, ())
    plan.kinds[LEAF] = kinds.INT8
    plan.arrays[f"{LEAF}.values"] = Array(tensor.shape, "int8", "VD")
    plan.arrays[f"{LEAF}.scale"] = Array(tensor.shape[:1], "bfloat16", "V")
    plan.made[f"{LEAF}.values"] = functools.partial(_values, tensor)
    plan.made[f"{LEAF}.scale"] = functools.partial(_scales, tensor)


def _values(tensor: Tensor, first: int, count: int) -> Shaped[np.ndarray, "count D"]:
    """Compute rows of the integers, int8."""
    found = np.empty((count, tensor.shape[1]), np.int8)
    for at, rows in _blocks(tensor, first, count):
        rows /= _scale(rows).astype(np.float32)[:, None]
        np.round(rows, out=rows)
        found[at : at + len(rows)] = np.clip(rows, -_LARGEST, _LARGEST, out=rows)
    return found


def _scales(tensor: Tensor, first: int, count: int) -> Shaped[np.ndarray, " count"]:
    """Compute the scales of rows, bfloat16."""
    return np.concatenate([_scale(rows) for _, rows in _blocks(tensor, first, count)])


def _blocks(
    tensor: Tensor, first: int, count: int
) -> Iterator[tuple[int, Float[np.ndarray, "some D"]]]:
    """Read rows of the head as float32, some at a time, each with its place among them."""
    step = max(1, copying.BLOCK_BYTES // (4 * tensor.shape[1]))
    for at in range(0, count, step):
        yield at, _rows(tensor, first + at, min(step, count - at))


def _scale(rows: Float[np.ndarray, "count D"]) -> Shaped[np.ndarray, " count"]:
    """Return the scale of each row, bfloat16: its largest magnitude becomes 127.

    Raises ValueError for a row that is not of numbers alone, which no integers stand for.
    """
    largest = np.abs(rows).max(axis=1) / np.float32(_LARGEST)
    if not np.isfinite(largest).all():
        raise ValueError(
            f"{TENSOR} has NaN or infinite values, which int8 cannot hold: download it again, or "
            "leave out --head int8"
        )
    return np.maximum(largest, np.finfo(np.float32).tiny).astype(ml_dtypes.bfloat16)


def _rows(tensor: Tensor, first: int, count: int) -> Float[np.ndarray, "count D"]:
    """Read rows of the head, float32."""
    width = tensor.shape[1]
    row_bytes = width * copying.numpy_dtype(tensor.dtype).itemsize
    with paths.reader(tensor.file) as source:
        rows = copying.read_rows(
            source,
            tensor.offset + first * row_bytes,
            count=count,
            columns=(width,),
            dtype=tensor.dtype,
        )
    return rows.astype(np.float32)
