"""Copies values between safetensors files and the chunk files of a model directory, in parallel.

Memory use stays within a few blocks of `BLOCK_BYTES`, whatever the size of a tensor. This module
knows neither the tensors' names nor when a folder is complete.
"""

import contextlib
import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

from qwen_jax.checkpoint.store import ITEM_BYTES, Band, Change, MatrixRows, StoredLeaf
from qwen_jax.runtime import paths, processes, progress

BLOCK_BYTES = 16 * 2**20
Source = int | paths.Object  # an int is a file's descriptor
Target = int | paths.Upload
Made = Callable[[int, int], MatrixRows]  # (number of the first row, of rows) -> these rows
Job = tuple[int, Callable[[], object]]  # the bytes that a job copies, and the job
_stop = threading.Event()
_NOT_BY_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a name such as "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def import_band(
    band: Band, params: Path, *, file: Path, offset: int, dtype: str, stride: int | None = None
) -> None:
    """Write the chunk files of a band from a safetensors file, cast to the leaf's dtype.

    params: the params/ folder of the model directory.
    file, offset: the safetensors file, and the byte in it at which the band's leaf begins.
    dtype: the dtype of the tensor in `file`.
    stride: the elements from one row of the leaf to the next in the tensor, where the leaf has only
        some of its columns; None where it has whole rows.

    A chunk file gets its final name once it is complete, so the chunk files that an interrupted run
    has left can be trusted.
    """
    row_bytes = (stride or band.row_elements) * ITEM_BYTES[dtype]
    offset += band.start * row_bytes
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(paths.reader(file))
        targets = [stack.enter_context(paths.writer(f)) for f in band.files(params)]
        plain = stride is None and dtype == band.leaf.dtype
        if len(targets) == 1 and band.whole and plain:
            _copy(source, targets[0], offset=offset, count=band.rows * row_bytes)
        elif stride is not None or band.whole or isinstance(source, paths.Object):
            columns = {"columns": band.leaf.shape[1:], "stride": stride}
            for first, rows in blocks(band, dtype):
                start = offset + first * row_bytes
                array = read_rows(source, start, count=rows, dtype=dtype, **columns)
                _write_pieces(band, targets, array)
        else:
            for first, rows in blocks(band, dtype):
                parts = _columns(
                    source, offset + first * row_bytes, rows=rows, band=band, dtype=dtype
                )
                for target, part in zip(targets, parts, strict=True):
                    write(target, cast(part, band.leaf.dtype, name=band.leaf.path))


def make_band(band: Band, params: Path, *, made: Made) -> None:
    """Write the chunk files of a band with values that are computed, cast to the leaf's dtype.

    params: the params/ folder of the model directory.
    made: computes rows of the leaf.
    """
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(paths.writer(f)) for f in band.files(params)]
        for first, rows in blocks(band, band.leaf.dtype):
            _write_pieces(band, targets, made(band.start + first, rows))


def _write_pieces(band: Band, targets: Iterable[Target], rows: MatrixRows) -> None:
    """Append whole rows of a band to its chunk files, to each its columns."""
    for target, at in zip(targets, band.pieces.values(), strict=True):
        write(target, cast(rows[(slice(None), *at)], band.leaf.dtype, name=band.leaf.path))


def read_rows(
    source: Source,
    offset: int,
    *,
    count: int,
    columns: tuple[int, ...],
    dtype: str,
    stride: int | None = None,
) -> MatrixRows:
    """Read `count` rows of an open safetensors file, [count, *columns].

    offset: the byte at which the first row begins.
    dtype: the dtype of the tensor.
    stride: the elements from one row to the next; None where rows follow one another.
    """
    kind, width = numpy_dtype(dtype), math.prod(columns)
    step = stride or width
    data = read(source, offset, count=((count - 1) * step + width) * kind.itemsize).view(kind)
    strides = (step * kind.itemsize, *(n * kind.itemsize for n in _strides(columns)))
    return np.lib.stride_tricks.as_strided(data, (count, *columns), strides, writeable=False)


def _columns(
    source: Source, offset: int, *, rows: int, band: Band, dtype: str
) -> Iterator[MatrixRows]:
    """Yield the values of each of the band's chunk files, as an array of `rows` matrix rows.

    source, offset: the open safetensors file, and the byte at which the first of these rows begins.
    dtype: the dtype of its tensor.

    Other processes write the other columns, which are not read.
    """
    kind, columns = numpy_dtype(dtype), band.leaf.shape[1:]
    for at in band.pieces.values():
        # Bytes are contiguous from the last axis that is cut on.
        cut = max(i for i, (s, n) in enumerate(zip(at, columns, strict=True)) if s != slice(0, n))
        starts = np.arange(rows) * band.row_elements
        for axis, (s, stride) in enumerate(zip(at, _strides(columns), strict=True)):
            if axis <= cut:
                numbers = np.arange(s.start, s.stop if axis < cut else s.start + 1)
                starts = (starts[:, None] + numbers * stride).reshape(-1)
        data = np.empty((rows, *(s.stop - s.start for s in at)), kind)
        for start, run in zip(starts.tolist(), data.reshape(len(starts), -1), strict=True):
            _fill(source, offset + start * kind.itemsize, memory=run.view(np.uint8).data)
        yield data


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Return the stride of each axis of a C-ordered array, in elements."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def stored_rows(leaf: StoredLeaf, params: Path, *, first: int, count: int) -> MatrixRows:
    """Read `count` rows of a stored leaf from row `first` on, from its chunk files."""
    array = np.empty((count, *leaf.shape[1:]), numpy_dtype(leaf.dtype))
    height, width = leaf.chunks[0], math.prod(leaf.chunks[1:])
    row_bytes = width * ITEM_BYTES[leaf.dtype]
    for band in leaf.bands():
        begin, end = max(first, band.start), min(first + count, band.start + height)
        for file, at in band.files(params).items() if begin < end else ():
            with paths.reader(file) as source:
                offset = (begin - band.start) * row_bytes
                data = read(source, offset, count=(end - begin) * row_bytes).view(array.dtype)
            rows = slice(begin - first, end - first)
            array[(rows, *at)] = data.reshape(end - begin, *leaf.chunks[1:])
    return array


def export_band(
    band: Band, params: Path, *, target: Target, dtype: str, change: Change | None = None
) -> None:
    """Append the values of a band to an open safetensors file, cast to `dtype`.

    params: the params/ folder with the band's chunk files.
    target: the open safetensors file.
    change: a function that merges an adapter into the rows before the cast (`peft.changes`), or
        None.
    """
    with contextlib.ExitStack() as stack:
        files = band.files(params)
        sources = {stack.enter_context(paths.reader(f)): at for f, at in files.items()}
        item = ITEM_BYTES[band.leaf.dtype]
        if len(sources) == 1 and dtype == band.leaf.dtype and change is None:
            _copy(next(iter(sources)), target, offset=0, count=band.chunk_elements * item)
            return
        narrow = band.leaf.chunks[1:]
        row_bytes = band.chunk_elements // band.rows * item
        for first, rows in blocks(band, dtype):
            array = np.empty((rows, *band.leaf.shape[1:]), numpy_dtype(band.leaf.dtype))
            for source, at in sources.items():
                data = read(source, first * row_bytes, count=rows * row_bytes)
                array[(slice(None), *at)] = data.view(array.dtype).reshape(rows, *narrow)
            if change is not None:
                array = change(band.start + first, array)
            write(target, cast(array, dtype, name=band.leaf.path))


def blocks(band: Band, dtype: str) -> Iterator[tuple[int, int]]:
    """Divide a band into blocks of about `BLOCK_BYTES`; yield (first row, number of rows) of each.

    dtype: the tensor's dtype in the safetensors file; the wider of it and the leaf's dtype counts.
    """
    item = max(ITEM_BYTES[dtype], ITEM_BYTES[band.leaf.dtype])
    step = max(1, BLOCK_BYTES // (band.row_elements * item))
    for first in range(0, band.rows, step):
        yield first, min(step, band.rows - first)


def cast(array: Shaped[np.ndarray, "..."], dtype: str, *, name: str) -> Shaped[np.ndarray, "..."]:
    """Cast an array to `dtype`, rounding to nearest. name: the leaf's path, for the error message.

    Raises ValueError if a finite value overflows.
    """
    if array.dtype == numpy_dtype(dtype):
        return array
    with np.errstate(over="ignore"):
        result = array.astype(numpy_dtype(dtype))
    if ITEM_BYTES[dtype] == 2 and np.any(np.isinf(result) & np.isfinite(array)):
        largest = float(np.nanmax(np.abs(array.astype(np.float32))))
        raise ValueError(
            f"{name} has values up to {largest:.3g}, which do not fit {dtype}: choose bfloat16 or "
            "float32 with --dtype"
        )
    return result


def read(source: Source, offset: int, *, count: int) -> UInt8[np.ndarray, " count"]:
    """Read `count` bytes of an open file from byte `offset` on, as uint8.

    Raises OSError if the file ends before that.
    """
    data = np.empty(count, np.uint8)
    _fill(source, offset, memory=data.data)
    return data


def _fill(source: Source, offset: int, *, memory: memoryview) -> None:
    """Read bytes from `offset` on until `memory` is full; OSError if the file ends before."""
    while memory:
        _check_stop()
        if isinstance(source, paths.Object):
            data = source.read(offset, min(len(memory), BLOCK_BYTES))
            got = len(data)
            memory[:got] = data
        else:
            got = os.preadv(source, [memory], offset)
        if got == 0:
            raise OSError("a file ended while it was read: it has been changed by someone else")
        memory, offset = memory[got:], offset + got


def write(target: Target, array: Shaped[np.ndarray, "..."]) -> None:
    """Append the bytes of an array, in C order."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while data:
        _check_stop()
        done = target.write(data) if isinstance(target, paths.Upload) else os.write(target, data)
        data = data[done:]


def _copy(source: Source, target: Target, *, offset: int, count: int) -> None:
    """Append `count` bytes of `source`, from byte `offset` on, to the open file `target`.

    The kernel copies them if it supports that; otherwise they go through a buffer.
    """
    while count:
        _check_stop()
        done = 0
        if isinstance(source, int) and isinstance(target, int):
            try:
                done = os.copy_file_range(source, target, min(count, BLOCK_BYTES), offset)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _NOT_BY_KERNEL:
                    raise
        if done == 0:  # some file systems return 0 instead of an error
            done = min(count, BLOCK_BYTES)
            write(target, read(source, offset, count=done))
        offset, count = offset + done, count - done


def _check_stop() -> None:
    """Raise InterruptedError if another job has failed, or the run was interrupted."""
    if _stop.is_set():
        raise InterruptedError("stopped")


def run(what: str, jobs: Iterable[Job], *, done: int = 0, workers: int = 2) -> None:
    """Run copying jobs in threads, with a progress bar of the bytes copied.

    what: the label of the progress bar.
    jobs: pairs of a job's bytes and its function.
    done: the bytes that an earlier run has copied, at which the bar starts.
    workers: the number of threads. With two, one waits for the disk while the other copies; with
        one, the jobs run in order.

    The first exception of a job is raised, and stops all other jobs within a block.
    """
    jobs = list(jobs)
    total = done + sum(size for size, _ in jobs)
    failed: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        _check_stop()
        try:
            work()
        except Exception as error:
            if not _stop.is_set():
                failed.append(error)
            _stop.set()  # before this worker can take the next job
            raise

    executor = ThreadPoolExecutor(workers)
    if processes.count() > 1:
        what = f"{what} (share of process 0)"
    bar = progress.bar(
        desc=what,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        disable=processes.index() > 0,
    )
    try:
        sizes = {executor.submit(guarded, work): size for size, work in jobs}
        for future in as_completed(sizes):
            if future.exception() is not None:
                raise failed[0]
            bar.update(sizes[future])
    finally:
        _stop.set()
        executor.shutdown(cancel_futures=True)  # waits for the jobs that run
        _stop.clear()
        bar.close()
