"""Batches in an order that depends on the seed alone, each process's part of them, read ahead.

grain shuffles, repeats, reads ahead and keeps the position, which is a number of batches: a run
goes on from it on any mesh and any number of processes.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from qwen_jax import meshes
from qwen_jax.meshes import sharding
from train.data.packing import Rows
from train.step.loss import Batch, place

_THREADS, _AHEAD = 4, 8  # batches


class Batches:
    """An endless iterator over batches of `size` rows on the mesh in force, from `position` on:
    the number of batches that have been taken before.

    Every epoch has each row once, in an order of its own. Raises ValueError where batches do not
    divide over the mesh.
    """

    def __init__(self, rows: Rows, length: int, size: int, seed: int, position: int = 0):
        mesh = jax.sharding.get_mesh()
        meshes.check({"B": size, "T": length}, mesh)
        self.size = size
        self._shape = (size, length)
        self._sharding = sharding.named("BT", mesh)
        indices: Any = self._sharding.addressable_devices_indices_map(self._shape).values()
        self._mine = sorted({row for index in indices for row in range(size)[index[0]]})
        shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
        source: Any = _Parts(shuffled, size, self._mine)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._parts = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self._parts.set_state({"next_index": position})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The rows of this process, on the mesh as a part of all."""
        part = next(self._parts)
        held = {row: i for i, row in enumerate(self._mine)}

        def one(values: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                rows = [held[row] for row in range(self._shape[0])[index[0]]]
                return values[rows][:, index[1]]

            return jax.make_array_from_callback(self._shape, self._sharding, shard)

        return jax.tree.map(one, part)


def once(rows: Rows, size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with rows that are padding."""
    nothing = jax.tree.map(np.zeros_like, rows[0])
    for first in range(0, len(rows), size):
        found = [rows[i] if i < len(rows) else nothing for i in range(first, first + size)]
        yield place(jax.tree.map(lambda *values: np.stack(values), *found))


class _Parts:
    """Batches by number, of each the rows `mine` alone: a source for grain."""

    def __init__(self, rows: Any, size: int, mine: list[int]):
        self._rows, self._size, self._mine = rows, size, mine

    def __len__(self) -> int:
        return 2**48  # without end

    def __getitem__(self, index: int) -> Batch:
        rows = [self._rows[index * self._size + row] for row in self._mine]
        return jax.tree.map(lambda *values: np.stack(values), *rows)
