"""Serves packed rows as training batches, in an order that depends on the seed alone.

grain shuffles, repeats, reads ahead and keeps the position; each process reads its own rows. The
position is a number of batches, so a run can resume from it on any mesh and with any number of
processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int, Shaped

from qwen_jax import meshes
from qwen_jax.meshes import moves, sharding
from train.data.batch import IGNORED, Batch
from train.data.packing import Rows

_THREADS, _AHEAD = 4, 8  # batches


def batch_of(tokens: Int[np.ndarray, "B T"], labels: Int[np.ndarray, "B T"]) -> Batch:
    """Make a batch in host memory from int [B, T] tokens and labels, one document per row.

    labels are not shifted: a token's label is predicted from the tokens before it. Labels that are
    `IGNORED` get weight 0. Raises ValueError for negative or fractional ids, or unequal shapes.
    """
    tokens, labels = np.asarray(tokens), np.asarray(labels)
    if tokens.ndim != 2 or tokens.shape != labels.shape:
        raise ValueError(f"tokens {tokens.shape} and labels {labels.shape}: both are [B, T]")
    for name, ids in {"tokens": tokens, "labels": labels[labels != IGNORED]}.items():
        if not np.issubdtype(ids.dtype, np.integer) or np.any(ids < 0):
            raise ValueError(f"{name} are whole numbers from 0, and labels {IGNORED} where ignored")
    tokens = tokens.astype(np.int32)
    after = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return Batch(
        tokens=tokens,
        targets=np.where(after == IGNORED, 0, after).astype(np.int32),
        positions=np.arange(tokens.shape[1], dtype=np.int32) + 0 * tokens,
        segments=np.ones_like(tokens),
        weights=(after != IGNORED).astype(np.float32),
    )


def place(batch: Batch) -> Batch:
    """Move a batch from host memory to the current mesh.

    Raises ValueError if the mesh does not divide it.
    """
    rows, tokens = batch.tokens.shape
    meshes.check({"B": rows, "T": tokens}, jax.sharding.get_mesh())
    return jax.tree.map(lambda x: moves.place(x, "BT"), batch)


class Batches:
    """An endless iterator over training batches on the current mesh.

    rows: the packed rows; each epoch has every row once, in an order of its own.
    length: the number of tokens in a row.
    size: the number of rows in a batch, over all processes.
    seed: the seed of the order.
    position: the number of batches to skip, such as those before a checkpoint.

    Raises ValueError if the mesh does not divide the batches.
    """

    def __init__(self, rows: Rows, length: int, *, size: int, seed: int, position: int = 0):
        mesh = jax.sharding.get_mesh()
        meshes.check({"B": size, "T": length}, mesh)
        self.size = size
        self._shape = (size, length)
        self._sharding = sharding.named("BT", mesh)
        indices: Any = self._sharding.addressable_devices_indices_map(self._shape).values()
        self._mine = sorted({row for index in indices for row in range(size)[index[0]]})
        shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
        source: Any = _Parts(shuffled, size, mine=self._mine)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._parts = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self._parts.set_state({"next_index": position})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch of the whole mesh, of which this process supplies its own rows."""
        part = next(self._parts)
        held = {row: i for i, row in enumerate(self._mine)}

        def one(values: Shaped[np.ndarray, "rows T"]) -> Shaped[jax.Array, "B T"]:
            def shard(index: Any) -> np.ndarray:
                rows = [held[row] for row in range(self._shape[0])[index[0]]]
                return values[rows][:, index[1]]

            return jax.make_array_from_callback(self._shape, self._sharding, shard)

        return jax.tree.map(one, part)


def once(rows: Rows, size: int) -> Iterator[Batch]:
    """Yield batches of `size` rows with every row once, in order; padding fills up the last one."""
    nothing = jax.tree.map(np.zeros_like, rows[0])
    for first in range(0, len(rows), size):
        found = [rows[i] if i < len(rows) else nothing for i in range(first, first + size)]
        yield place(jax.tree.map(lambda *values: np.stack(values), *found))


class _Parts:
    """A grain source whose item i is batch i, with only the rows that this process supplies.

    rows: all rows in training order, as a grain dataset. size: the number of rows in a batch. mine:
    the indices of this process's rows within a batch.
    """

    def __init__(self, rows: grain.MapDataset[Batch], size: int, *, mine: Sequence[int]):
        self._rows, self._size, self._mine = rows, size, mine

    def __len__(self) -> int:
        return 2**48  # without end

    def __getitem__(self, index: int) -> Batch:
        rows = [self._rows[index * self._size + row] for row in self._mine]
        return jax.tree.map(lambda *values: np.stack(values), *rows)
