"""The head of a checkpoint in 8 bits, with a scale for each row (`leaves.int8`).

The head is a quarter to a half of the bytes of a model whose layers have 4 bits.
"""

import functools
import itertools

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
    rows = _rows(tensor, first, count)
    values = np.round(rows / _scale(rows).astype(np.float32)[:, None])
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.int8)


def _scales(tensor: Tensor, first: int, count: int) -> Shaped[np.ndarray, " count"]:
    """Compute the scales of rows, bfloat16, a block of rows at a time."""
    step = max(1, copying.BLOCK_BYTES // (4 * tensor.shape[1]))
    ends = [*range(first, first + count, step), first + count]
    return np.concatenate(
        [_scale(_rows(tensor, at, end - at)) for at, end in itertools.pairwise(ends)]
    )


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
