"""Reads the float model that is quantised, one weight or one block at a time.

Where an adapter is merged, this happens here, so that a merged model of floats is never written.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import kinds, peft, store
from qwen_jax.checkpoint.directory import MANIFEST, PARAMS
from qwen_jax.checkpoint.store import Change
from qwen_jax.config import Config
from qwen_jax.leaves import grouped
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Weight, map_leaves
from qwen_jax.meshes import moves, sharding
from qwen_jax.model.decoder import Block
from qwen_jax.runtime import paths


class Source:
    """A model directory, read piece by piece onto a mesh as floats.

    root: the directory. Its weights may be integers if there is an adapter, which is merged into
        the floats that they stand for.
    mesh: the mesh.
    adapter: the folder of an adapter in PEFT's format that is merged into the weights; None for
        none.

    Raises CheckpointError if the directory is not complete, and ValueError if it does not divide
    over the mesh, is quantised and without adapter, or if the adapter is not of this model.
    """

    def __init__(self, root: Path, mesh: Mesh, *, adapter: Path | None = None):
        self.root = root
        self.manifest: dict[str, Any] = checkpoint.verify_whole(root)
        self.config: Config = checkpoint.load_config(root)
        self._kinds = kinds.of_manifest(self.manifest)
        if self._kinds and adapter is None:
            raise ValueError(
                f"{root} is quantised already ({len(self._kinds)} weights): give the directory of "
                "floats that it was made from, or an adapter to merge"
            )
        self.decoder, self.leaves = checkpoint.abstract_leaves(self.config, self.dtype)
        shapes = {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}
        kinds.check_shapes(root, self.manifest, wanted=shapes)
        meshes.check(self.config.sizes, mesh)
        self._place = {"mesh": mesh, "sizes": self.config.sizes}
        self._fields = {
            path: kinds.layout(
                kind,
                self.leaves[path],
                stored=kinds.fields_of(path, self.manifest),
                **self._place,
            )
            for path, kind in self._kinds.items()
        }
        self._mesh, self.adapter = mesh, adapter
        self._changes: dict[str, Change] = {}
        self.generation_config: Path | None = None
        if adapter is not None:
            self._changes = peft.changes(adapter, shapes)
            self.generation_config = peft.generation_config(adapter, self.config.vocab_size)

    @property
    def dtype(self) -> str:
        """The dtype in which its plain weights are stored."""
        return self.manifest["dtype"]

    @property
    def facts(self) -> dict[str, Any]:
        """Values that identify the model."""
        changed_at = paths.stamp(self.root / MANIFEST)[1]
        found: dict[str, Any] = {"source": str(self.root), "source_changed_at": changed_at}
        if self.adapter is not None:
            stamps = {file.name: paths.stamp(file) for file in peft.files(self.adapter)}
            found["adapter"] = {"folder": str(self.adapter), **stamps}
        return found

    def weight(self, path: str) -> Weight:
        """Read one weight: as it is stored, or in float32 where it is computed."""
        leaf = self.leaves[path]
        place = sharding.named(leaf.letters, self._mesh, lengths=self.config.sizes)
        with store.one_line(self.root, "read"):
            if path in self._kinds:
                array = self._floats(path)
            else:
                array = store.restore(
                    self.root / PARAMS, path, shape=tuple(leaf.shape), dtype=leaf.dtype, place=place
                )
        if path in self._changes:
            array = self._merged(array, self._changes[path], letters=leaf.letters)
        return Weight(jax.device_put(array, place), letters=leaf.letters)

    def block(self, number: int) -> Block:
        """Read the weights of one block."""
        layers = self.decoder.layers
        assert not isinstance(layers, Block), "a directory has separate layers"
        return map_leaves(lambda name, _: self.weight(f"layers.{number}.{name}"), layers[number])

    def stored(self, path: str, weight: Weight) -> Weight:
        """Return a weight in the dtype of the directory, in which it is written if it stays floats.

        Raises ValueError that names it by its path if the dtype has no room for it.
        """
        dtype = jnp.dtype(self.dtype)
        if weight.dtype == dtype:
            return weight
        cast = weight[...].astype(dtype)
        if not moves.fetch(jnp.all(jnp.isfinite(cast))):
            raise ValueError(
                f"{path} with the adapter of {self.adapter} does not fit {self.dtype}: convert the "
                "model with --dtype bfloat16 or float32"
            )
        return Weight(cast, letters=weight.letters)

    def _floats(self, path: str) -> jax.Array:
        """Return the floats that a quantised weight stands for, float32."""
        how = {"kind": self._kinds[path], "fields": self._fields[path], **self._place}
        leaf = kinds.restore(self.root / PARAMS, path, **how)
        if isinstance(leaf, Grouped):
            return grouped.plain(leaf, "float32").get_value()
        return leaf.dequantize("float32")

    def _merged(self, array: jax.Array, change: Change, *, letters: str) -> jax.Array:
        """Return a matrix with the adapter merged into it, float32, its outputs over devices.

        letters: the axis letters of the matrix.

        It is computed on the host, by the function that merges when a model is exported, so that
        both are of the same bits.
        """
        outputs = sharding.spec(letters[0], self.config.sizes, mesh=self._mesh)
        rows = NamedSharding(self._mesh, P(*outputs, None))
        held: dict[int, jax.Array] = {}
        for shard in jax.device_put(array, rows).addressable_shards:
            held[shard.index[0].start or 0] = shard.data
        merged = {first: change(first, np.asarray(data)) for first, data in held.items()}

        def part(index: Any) -> np.ndarray:
            return merged[index[0].start or 0]

        return jax.make_array_from_callback(array.shape, rows, part)
