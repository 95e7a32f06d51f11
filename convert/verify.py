"""Verifies that a model directory and a checkpoint folder hold the same values, bit for bit.

The model directory is read through TensorStore, as Orbax reads it, not through the code that wrote
it. If the dtypes differ, the copy must equal the source after a cast. If an adapter was merged, the
copy must equal a second merge, over the same blocks of matrix rows, after a cast.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import copying
from convert.copying import Job, Made
from convert.names import Expected, TensorPart
from qwen_jax.checkpoint import store
from qwen_jax.checkpoint.safetensors_header import Tensor
from qwen_jax.checkpoint.store import ITEM_BYTES, Band, Change, StoredLeaf
from qwen_jax.runtime import paths, processes


def verify(
    params: Path,
    leaves: Mapping[str, StoredLeaf],
    *,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Expected],
    exported: bool,
    changes: Mapping[str, Change] | None = None,
    made: Mapping[str, Made] | None = None,
) -> None:
    """Compare a model directory with a checkpoint folder, and name the tensors that differ.

    params: the params/ folder of the model directory.
    leaves: its stored leaves, by path.
    tensors: the location of each tensor in the checkpoint folder, by name.
    wanted: the leaves that each tensor holds, by the tensor's name.
    exported: whether the checkpoint folder is the copy, and the model directory its source.
    changes: functions that merge an adapter into leaves, by leaf path (`peft.changes`).
    made: functions that compute what is no copy: leaves, by path; or, if `exported`, tensors, by
        name.

    Raises ValueError if tensors differ. Each process compares its share, and raises for that alone.
    """
    different: set[str] = set()
    jobs = _jobs(
        params,
        leaves,
        tensors=tensors,
        wanted=wanted,
        exported=exported,
        changes=changes or {},
        different=different,
    )
    computed: dict[str, Made] = dict(made or {})
    if exported:
        again = _of_made_tensors(tensors, made=computed, different=different)
    else:
        again = _of_made(params, leaves, made=computed, different=different)
    jobs = itertools.chain(jobs, again)
    copying.run("verifying", itertools.islice(jobs, processes.index(), None, processes.count()))
    if different:
        names = ", ".join(name for name in (*wanted, *(made or {})) if name in different)
        # The sums of a merge are rounded by the processor, and by how many threads share them.
        alike = ", all of it on machines of one kind" if changes else ""
        raise ValueError(
            f"verification failed: source and target differ in {names}; remove the target and "
            f"convert again{alike}"
        )


def _jobs(
    params: Path,
    leaves: Mapping[str, StoredLeaf],
    *,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Expected],
    exported: bool,
    changes: Mapping[str, Change],
    different: set[str],
) -> Iterator[Job]:
    """Yield a job for each band of each tensor, which compares it.

    The jobs add the names of tensors that differ to `different`. The other arguments are those of
    `verify`.
    """
    for name, expected in wanted.items():
        for part in expected.parts:
            array, change = _open(params, part.path, part.shape), changes.get(part.path)
            for band in leaves[part.path].bands():
                job = functools.partial(
                    _compare,
                    name,
                    different,
                    array=array,
                    tensor=tensors[name],
                    part=part,
                    band=band,
                    exported=exported,
                    change=change,
                )
                yield band.rows * band.row_elements * ITEM_BYTES[band.leaf.dtype], job


def _of_made(
    params: Path,
    leaves: Mapping[str, StoredLeaf],
    *,
    made: Mapping[str, Made],
    different: set[str],
) -> Iterator[Job]:
    """Yield a job for each band of each computed leaf, which computes it again and compares it.

    The jobs add the paths of leaves that differ to `different`.
    """
    for path, rows in made.items():
        array = _open(params, path, leaves[path].shape)
        for band in leaves[path].bands():
            size = band.rows * band.row_elements * ITEM_BYTES[band.leaf.dtype]
            yield size, functools.partial(_compare_made, array, band, rows, different)


def _compare_made(array: Any, band: Band, made: Made, different: set[str]) -> None:
    """Compare a band of a computed leaf, opened by `_open`, with the same rows computed again."""
    for first, rows in copying.blocks(band, band.leaf.dtype):
        start = band.start + first
        inner = array[start : start + rows].read().result()
        outer = copying.cast(made(start, rows), band.leaf.dtype, name=band.leaf.path)
        if inner.tobytes() != outer.tobytes():
            different.add(band.leaf.path)


def _of_made_tensors(
    tensors: Mapping[str, Tensor], *, made: Mapping[str, Made], different: set[str]
) -> Iterator[Job]:
    """Yield a job for each computed tensor, which computes it again and compares it.

    The jobs add the names of tensors that differ to `different`.
    """
    for name, rows in made.items():
        tensor = tensors[name]
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        yield size, functools.partial(_compare_tensor, name, tensor, rows, different)


def _compare_tensor(name: str, tensor: Tensor, made: Made, different: set[str]) -> None:
    """Compare a tensor of a file with its rows computed again, a block of rows at a time."""
    row_bytes = math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
    step = max(1, copying.BLOCK_BYTES // row_bytes)
    with paths.reader(tensor.file) as file:
        for first in range(0, tensor.shape[0], step):
            count = min(step, tensor.shape[0] - first)
            outer = copying.read(file, tensor.offset + first * row_bytes, count=count * row_bytes)
            inner = copying.cast(made(first, count), tensor.dtype, name=name)
            if outer.tobytes() != inner.tobytes():
                different.add(name)
                return


def _open(params: Path, path: str, shape: tuple[int, ...]) -> Any:
    """Open a leaf with TensorStore, whose types are not known to type checkers.

    Raises ValueError if the stored shape is another than `shape`.
    """
    array = store.open_leaf(params, path)
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{params / path} has shape {list(array.shape)}, not {list(shape)}: convert again"
        )
    return array


def _compare(
    name: str,
    different: set[str],
    *,
    array: Any,
    tensor: Tensor,
    part: TensorPart,
    band: Band,
    exported: bool,
    change: Change | None,
) -> None:
    """Compare a band of a leaf with its bytes in a tensor's file.

    name: the tensor's name, which is added to `different` if they are not equal. array: the leaf,
    opened by `_open`. The other arguments are those of `verify`, for one band.
    """
    row_bytes = (part.stride or band.row_elements) * ITEM_BYTES[tensor.dtype]
    offset = tensor.offset + part.start * ITEM_BYTES[tensor.dtype] + band.start * row_bytes
    with paths.reader(tensor.file) as file:
        for first, rows in copying.blocks(band, tensor.dtype):
            start = band.start + first
            outer = copying.read_rows(
                file,
                offset + first * row_bytes,
                count=rows,
                columns=band.leaf.shape[1:],
                dtype=tensor.dtype,
                stride=part.stride,
            )
            outer = np.ascontiguousarray(outer).reshape(-1)
            inner = array[start : start + rows].read().result()
            if change is not None:
                inner = change(start, inner)
            inner = inner.reshape(-1)
            if exported:
                inner = copying.cast(inner, tensor.dtype, name=part.path)
            else:
                outer = copying.cast(outer, band.leaf.dtype, name=part.path)
            if not np.array_equal(outer.view(np.uint8), inner.view(np.uint8)):
                different.add(name)
                return
