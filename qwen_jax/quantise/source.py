"""Reads the float model that is quantised, one weight or one block at a time."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import kinds, store
from qwen_jax.checkpoint.directory import PARAMS
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Weight, map_leaves
from qwen_jax.meshes import sharding
from qwen_jax.model.decoder import Block


class Source:
    """A model directory of floats, read piece by piece onto a mesh.

    root: the directory.
    mesh: the mesh.

    Raises CheckpointError if the directory is not complete, and ValueError if it is quantised or
    does not divide over the mesh.
    """

    def __init__(self, root: Path, mesh: Mesh):
        self.root = root
        self.manifest: dict[str, Any] = checkpoint.verify_whole(root)
        self.config: Config = checkpoint.load_config(root)
        if found := kinds.of_manifest(self.manifest):
            raise ValueError(
                f"{root} is quantised already ({len(found)} weights): give the directory of floats "
                "that it was made from"
            )
        self.decoder, self.leaves = checkpoint.abstract_leaves(self.config, self.dtype)
        shapes = {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}
        kinds.check_shapes(root, self.manifest, wanted=shapes)
        meshes.check(self.config.sizes, mesh)
        self._mesh = mesh

    @property
    def dtype(self) -> str:
        """The dtype in which its weights are stored."""
        return self.manifest["dtype"]

    def weight(self, path: str) -> Weight:
        """Read one weight."""
        leaf = self.leaves[path]
        place = sharding.named(leaf.letters, self._mesh, lengths=self.config.sizes)
        with store.one_line(self.root, "read"):
            array = store.restore(
                self.root / PARAMS, path, shape=tuple(leaf.shape), dtype=leaf.dtype, place=place
            )
        return Weight(array, letters=leaf.letters)

    def block(self, number: int) -> Block:
        """Read the weights of one block."""
        layers = self.decoder.layers
        assert not isinstance(layers, Block), "a directory has separate layers"
        return map_leaves(lambda name, _: self.weight(f"layers.{number}.{name}"), layers[number])
