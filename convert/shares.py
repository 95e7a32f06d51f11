"""Which process writes which files of a model directory.

A chunk belongs to a process that holds its shard when the directory is loaded on the mesh it is cut
for; where several do, to the one with the fewest bytes so far. Without a mesh everyone may have
everything, so the bytes come out even. Every process computes the same, without asking another.
"""

import math
from collections.abc import Mapping

import numpy as np

from convert.store import Band

Partition = tuple[tuple[str, ...], ...]  # for each axis of a leaf, the mesh axes that cut it


class Shares:
    """Hands out the chunks of a tree, band by band; every process must ask in the same order."""

    def __init__(
        self, sizes: Mapping[str, int], partitions: Mapping[str, Partition], index: int, count: int
    ):
        """sizes: of the mesh axes; partitions: by leaf; index: this process, of `count`."""
        devices = math.prod(sizes.values())
        self._axes = tuple(sizes)
        # jax numbers devices process by process, and a mesh takes them in this order.
        self._process = (np.arange(devices) * count // devices).reshape(tuple(sizes.values()))
        self._partitions, self._index = partitions, index
        self._bytes = [0] * count

    def of(self, band: Band) -> dict[str, tuple[slice, ...]]:
        """Those of the band's pieces that this process writes."""
        return {name: at for name, at in band.pieces.items() if self._mine(band, name)}

    def _mine(self, band: Band, name: str) -> bool:
        owner = min(self._holders(band, name), key=self._bytes.__getitem__)
        self._bytes[owner] += band.chunk_elements
        return owner == self._index

    def _holders(self, band: Band, name: str) -> list[int]:
        """The processes with a device that holds this chunk."""
        if self._process.size == 1:
            return list(range(len(self._bytes)))
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
