"""The layout of a model directory's params/: where each byte of a leaf is stored, and its metadata.

A leaf is one array of weights. The layout is Orbax's without OCDBT: a Zarr array for each leaf, and
`_METADATA` with the tree. A chunk is a file of raw bytes, so a leaf can be copied without Orbax,
jax or even an array, by the operating system if neither dtype nor columns change. Chunks follow the
shards of the mesh, and a shard is split further along its first axis, so that reading and writing
take little memory. TensorStore moves the values between chunks and devices, one chunk at a time.
"""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from qwen_jax.checkpoint.directory import DTYPES, PARAMS, CheckpointError
from qwen_jax.runtime import lock, paths

if TYPE_CHECKING:
    import jax
    from jax.sharding import Sharding

CHUNK_BYTES = 64 * 2**20
_WRITES = 8  # chunks written at the same time; each write waits until its chunk is on the disk
# The bytes of an element; integers are parts of quantised weights.
ITEM_BYTES = dict(zip(DTYPES, (4, 2, 2), strict=True)) | {
    "uint32": 4,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
}
# The names of dtypes in Zarr's metadata, where they are not the same.
_ZARR = {
    "float32": "<f4",
    "float16": "<f2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint8": "|u1",
    "int8": "|i1",
}

MatrixRows = Shaped[np.ndarray, "rows ..."]
Change = Callable[[int, MatrixRows], MatrixRows]  # (number of the first row, rows) -> changed rows


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """The description of a stored leaf, whose Zarr array is the folder `params/{path}`.

    path: the path of the leaf in the tree, such as "layers.0.attn.q".
    shape: the shape of the leaf.
    chunks: the shape of a chunk, which divides the leaf's shape.
    dtype: the name of the dtype.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str

    def bands(self) -> "Iterator[Band]":
        """Cut the leaf along its first axis into bands, each one chunk high."""
        for first in range(self.shape[0] // self.chunks[0]):
            counts = [n // c for n, c in zip(self.shape[1:], self.chunks[1:], strict=True)]
            pieces = {}
            for index in itertools.product(*map(range, counts)):
                name = ".".join(map(str, (first, *index)))
                columns = zip(index, self.chunks[1:], strict=True)
                pieces[name] = tuple(slice(i * c, (i + 1) * c) for i, c in columns)
            yield Band(self, first * self.chunks[0], pieces)


@dataclasses.dataclass(frozen=True)
class Band:
    """A band of a leaf: `leaf.chunks[0]` successive matrix rows, with one file per column range.

    leaf: the leaf.
    start: the index of the band's first row in the leaf.
    pieces: the name of each chunk file, with its ranges on all axes but the first. With several
        processes, each may have a band of only the columns that it writes.
    """

    leaf: StoredLeaf
    start: int
    pieces: Mapping[str, tuple[slice, ...]]

    @property
    def rows(self) -> int:
        """The number of matrix rows in the band."""
        return self.leaf.chunks[0]

    @property
    def row_elements(self) -> int:
        """The number of elements in one matrix row of the leaf, over all columns."""
        return math.prod(self.leaf.shape[1:])

    @property
    def chunk_elements(self) -> int:
        """The number of elements in one chunk file."""
        return math.prod(self.leaf.chunks)

    @property
    def whole(self) -> bool:
        """Whether the band has all columns of the leaf."""
        return len(self.pieces) * self.chunk_elements == self.rows * self.row_elements

    def files(self, params: Path) -> dict[Path, tuple[slice, ...]]:
        """Return the path of each chunk file, with its ranges on all axes but the first."""
        return {params / self.leaf.path / name: at for name, at in self.pieces.items()}


def chunk_shape(shard: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """Return the shape of the chunks, of at most `CHUNK_BYTES`, that a shard is stored in.

    shard: the shape of the shard.
    item_bytes: the bytes of an element.

    The first axis is divided into equal parts, because Zarr pads unequal parts. If it has no
    suitable divisor, it stays whole.
    """
    wanted = math.ceil(math.prod(shard) * item_bytes / CHUNK_BYTES)
    parts = next((n for n in range(wanted, 8 * wanted) if shard[0] % n == 0), 1)
    return (shard[0] // parts, *shard[1:])


def chunk_files(leaves: Mapping[str, StoredLeaf]) -> dict[str, int]:
    """Return the size in bytes that every chunk must have, by its path relative to params/."""
    return {
        f"{leaf.path}/{name}": band.chunk_elements * ITEM_BYTES[leaf.dtype]
        for leaf in leaves.values()
        for band in leaf.bands()
        for name in band.pieces
    }


def write_metadata(params: Path, leaves: Mapping[str, StoredLeaf]) -> None:
    """Write the metadata of all leaves in a params/ folder, which then lacks only the chunks.

    leaves: the descriptions of the leaves, by path.
    """
    tree = {}
    arrays: dict[Path, bytes] = {}
    for leaf in leaves.values():
        array = {
            "zarr_format": 2,
            "shape": leaf.shape,
            "chunks": leaf.chunks,
            "dtype": _ZARR.get(leaf.dtype, leaf.dtype),
            "order": "C",
            "compressor": None,
            "fill_value": None,  # with another value, chunks that hold only it would be left out
            "filters": None,
            "dimension_separator": ".",
        }
        arrays[params / leaf.path / ".zarray"] = json.dumps(array).encode()
        keys = tuple(leaf.path.split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: key of a dict
            # A numpy array can be opened on any machine, whatever mesh the chunks were made for.
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    for file in arrays:
        paths.make_folder(file.parent)
    with _small_files(params) as executor:
        list(executor.map(paths.write, arrays.keys(), arrays.values()))
    paths.write(params / "_METADATA", json.dumps(metadata).encode())


def _small_files(params: Path) -> ThreadPoolExecutor:
    """Return a thread pool for small files: 16 threads for remote files, which are slow to answer.

    For local files it has one thread; more would only cost memory.
    """
    return ThreadPoolExecutor(16 if paths.is_remote(params) else 1)


def read_leaves(params: Path) -> dict[str, StoredLeaf]:
    """Read the descriptions of all leaves of a params/ folder that `write_metadata` wrote, by path.

    Raises ValueError for compressed arrays.
    """
    leaves, dtypes = {}, {zarr: dtype for dtype, zarr in _ZARR.items()}
    files = list(params.glob("*/.zarray"))
    with _small_files(params) as executor:
        texts = list(executor.map(lambda file: file.read_text(encoding="utf-8"), files))
    for file, text in zip(files, texts, strict=True):
        array = json.loads(text)
        path = file.parent.name
        if array["zarr_format"] != 2 or array["compressor"] or array["filters"]:
            raise ValueError(
                f"{file.parent} is compressed: only plain chunks can be exported; load it and save "
                "it with qwen_jax.checkpoint.save"
            )
        dtype = dtypes[array["dtype"]] if array["dtype"] in dtypes else array["dtype"]
        leaves[path] = StoredLeaf(path, tuple(array["shape"]), tuple(array["chunks"]), dtype)
    return leaves


def open_leaf(params: Path, name: str, *, write: bool = False) -> Any:
    """Open a stored leaf as a TensorStore; a missing chunk is an error and never read as zeros.

    name: the path of the leaf.
    """
    import tensorstore

    # With the default number of parallel reads, gigabytes of chunks would be in memory.
    limits = {"file_io_concurrency": _WRITES if write else 2, "gcs_request_concurrency": _WRITES}
    context = tensorstore.Context({key: {"limit": limit} for key, limit in limits.items()})
    spec = {
        "driver": "zarr",
        "kvstore": paths.kvstore(params / name),
        "fill_missing_data_reads": False,
        # A chunk read for one shard is reused for the next: nobody changes it meanwhile.
        "recheck_cached_data": "open",
    }
    return tensorstore.open(spec, open=True, read=True, write=write, context=context).result()


def restore(
    params: Path,
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: "Sharding",
    repeat: int = 1,
) -> "jax.Array":
    """Restore one leaf as a jax array, of which each process reads only its own shards.

    name: the path of the leaf.
    shape, dtype: the shape and dtype of the result.
    place: the sharding of the result.
    repeat: how often each row of the stored array follows itself in the result.

    Shards are read straight into memory that jax takes over. Orbax's own restore needs memory for
    about 1.5 times the weights.
    """
    import jax
    import tensorstore

    stored = tensorstore.cast(open_leaf(params, name), tensorstore.dtype(dtype))

    def shard(index: Any) -> np.ndarray:
        if repeat > 1:
            first, end, _ = index[0].indices(shape[0])
            rows = stored[(slice(first // repeat, -(-end // repeat)), *index[1:])].read().result()
            skipped = first % repeat
            return np.repeat(rows, repeat, axis=0)[skipped : skipped + end - first]
        piece = stored[index]
        memory = _aligned(piece.shape, dtype)
        tensorstore.array(memory).write(piece[tensorstore.d[:].translate_to[0]]).result()
        return memory

    return jax.make_array_from_callback(shape, place, shard)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array at a 64-byte boundary, which a CPU device uses without copying it."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count].view(dtype).reshape(shape)


def write_shards(params: Path, leaf: StoredLeaf, *, array: "jax.Array", layer: int | None) -> None:
    """Write this process's shards of a leaf, one chunk at a time.

    leaf: the description of the leaf.
    array: the leaf, or stacked layers.
    layer: the leaf's index on the first axis of stacked layers, or None.

    Of replicated shards only the first is written. Must be called without a mesh: each shard is an
    array of its own, on one device.
    """
    import jax
    import tensorstore

    stored = None
    for shard in array.addressable_shards:
        index, data = shard.index, shard.data
        at: tuple[int, ...] = ()
        if layer is not None:
            first, end, _ = index[0].indices(array.shape[0])
            if not first <= layer < end:
                continue
            index, at = index[1:], (layer - first,)
        if shard.replica_id != 0:
            continue
        stored = stored or open_leaf(params, leaf.path, write=True)
        target = stored[index][tensorstore.d[:].translate_to[0]]
        rows = leaf.chunks[0]
        for row in range(0, target.shape[0], rows):
            sizes = (*(1 for _ in at), rows, *target.shape[1:])
            begin = (*at, row, *(0 for _ in target.shape[1:]))
            piece = jax.lax.dynamic_slice(data, begin, sizes).reshape(sizes[len(at) :])
            target[row : row + rows].write(np.asarray(piece)).result()


@contextlib.contextmanager
def one_line(root: Path, what: str) -> Iterator[None]:
    """Context manager: turn TensorStore's many kinds of errors into a CheckpointError of one line.

    root: the model directory, for the message.
    what: "read" or "written", for the message.
    """
    try:
        yield
    except (CheckpointError, lock.Busy):
        raise
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{root / PARAMS} cannot be {what}: {detail}") from error
