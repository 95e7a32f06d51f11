"""Divides the chunk files of a model directory among the processes that write them.

A chunk goes to a process that holds its shard when the directory is loaded on the mesh it is made
for; among several such processes, to the one with fewest bytes so far. Without a mesh any process
may take any chunk, so the bytes come out even. Every process computes the same result, without
communication.
"""

import math
from collections.abc import Mapping

import numpy as np

from qwen_jax.checkpoint.store import Band, StoredLeaf

Partition = tuple[tuple[str, ...], ...]  # for each axis of a leaf, the mesh axes that cut it


class Shares:
    """Divides a model directory's chunk files among processes, so that each writes its own."""

    def __init__(
        self,
        leaves: Mapping[str, StoredLeaf],
        partitions: Mapping[str, Partition],
        *,
        sizes: Mapping[str, int],
        count: int,
    ):
        """Choose the process that writes each chunk.

        leaves: the stored leaves, by path.
        partitions: for each leaf, the mesh axes that divide each of its axes.
        sizes: the number of devices along each mesh axis.
        count: the number of processes.
        """
        devices = math.prod(sizes.values())
        self._axes = tuple(sizes)
        # jax numbers devices process by process, and a mesh takes them in this order. On some TPU
        # slices it follows the links instead, and there another process writes a chunk.
        self._process = (np.arange(devices) * count // devices).reshape(tuple(sizes.values()))
        self._partitions, self._count = partitions, count
        self._writer: dict[tuple[str, str], int] = {}
        held = [0] * count
        bands = [band for leaf in leaves.values() for band in leaf.bands()]
        # The largest chunks first, so that small ones even out the sums.
        for band in sorted(bands, key=lambda band: -band.chunk_elements):
            for name in band.pieces:
                writer = min(self._holders(band, name), key=held.__getitem__)
                held[writer] += band.chunk_elements
                self._writer[band.leaf.path, name] = writer

    def of(self, process: int, band: Band) -> dict[str, tuple[slice, ...]]:
        """Return the chunk files of a band that a process writes, with each file's columns."""
        path = band.leaf.path
        return {n: at for n, at in band.pieces.items() if self._writer[path, n] == process}

    def _holders(self, band: Band, name: str) -> list[int]:
        """Return the indices of the processes with a device that holds a chunk of a band.

        name: the chunk's file name, such as "0.1": its index along each axis of the leaf.
        """
        if self._process.size == 1:
            return list(range(self._count))
        sizes = dict(zip(self._axes, self._process.shape, strict=True))
        where = dict.fromkeys(self._axes, slice(None))
        partition, leaf = self._partitions[band.leaf.path], band.leaf
        for axes, number, length, chunk in zip(
            partition, map(int, name.split(".")), leaf.shape, leaf.chunks, strict=True
        ):
            parts = tuple(sizes[axis] for axis in axes)
            shard = number * chunk * math.prod(parts) // length
            coordinates = np.unravel_index(shard, parts) if parts else ()
            where |= {axis: slice(i, i + 1) for axis, i in zip(axes, coordinates, strict=True)}
        return np.unique(self._process[tuple(where.values())]).tolist()
