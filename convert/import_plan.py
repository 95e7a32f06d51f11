"""The plan of a conversion into a model directory: what is read, written, verified and recorded."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convert import copying, names, shares
from convert import verify as verification
from convert.conversion import Conversion, Remaining
from convert.copying import Job, Made
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, kinds, store
from qwen_jax.checkpoint.safetensors_header import Tensor
from qwen_jax.runtime import command, paths, processes

# A model in the cache of the Hugging Face hub's library.
_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPlan(Conversion):
    """The plan of a conversion into a model directory, whose input has been checked.

    tensors: the location of each tensor in the checkpoint, by name.
    wanted: the leaves that each of these tensors holds, by the tensor's name.
    made: functions that compute the other leaves, by path.
    leaves: the layout of each leaf in the model directory, by path.
    partitions: for each leaf, the mesh axes that divide each of its axes.
    manifest: entries of the manifest beside `facts`.
    """

    tensors: dict[str, Tensor]
    wanted: dict[str, names.Expected]
    made: dict[str, Made]
    leaves: dict[str, store.StoredLeaf]
    partitions: dict[str, shares.Partition]
    manifest: dict[str, Any]

    @property
    def params(self) -> Path:
        """The folder of the target's arrays."""
        return self.target / directory.PARAMS

    def remaining(self, resumed: bool) -> Remaining:
        """Return what is left to copy. resumed: whether chunk files that exist count as written."""
        done = needed = 0
        jobs: list[Job] = []
        found = directory.file_sizes(self.target) if resumed else {}
        share = shares.Shares(
            self.leaves, self.partitions, sizes=self.facts["mesh"], count=processes.count()
        )
        for path, write in self._writers():
            for band in self.leaves[path].bands():
                mine = share.of(processes.index(), band)
                piece = band.chunk_elements * store.ITEM_BYTES[band.leaf.dtype]
                where = f"{directory.PARAMS}/{path}"
                there = {name for name in band.pieces if found.get(f"{where}/{name}") == piece}
                lacking = band.pieces.keys() - there
                needed += piece * len(lacking)
                done += piece * len(there)
                if todo := {name: at for name, at in mine.items() if name in lacking}:
                    rest = dataclasses.replace(band, pieces=todo)
                    jobs.append((piece * len(todo), functools.partial(write, rest, self.params)))
        return Remaining(done, needed, jobs)

    def _writers(self) -> Iterator[tuple[str, Callable[..., None]]]:
        """Yield the path of each leaf, with the function that writes a band of it to `params`."""
        for tensor, expected in zip(self.tensors.values(), self.wanted.values(), strict=True):
            for part in expected.parts:
                offset = tensor.offset + part.start * store.ITEM_BYTES[tensor.dtype]
                source = {"file": tensor.file, "offset": offset, "dtype": tensor.dtype}
                copy = functools.partial(copying.import_band, **source, stride=part.stride)
                yield part.path, copy
        for path, made in self.made.items():
            yield path, functools.partial(copying.make_band, made=made)

    def begin(self) -> None:
        """Write config.json and the metadata of the arrays.

        Floats made of a quantised checkpoint are not said to be quantised.
        """
        paths.copy(self.source / directory.CONFIG, self.target / directory.CONFIG)
        if self.facts.get("dequantise"):
            directory.forget_quantisation(self.target)
        store.write_metadata(self.params, self.leaves)

    def verify(self) -> None:
        """Compare every tensor of the target with the source; ValueError if any differs."""
        verification.verify(
            self.params,
            self.leaves,
            tensors=self.tensors,
            wanted=self.wanted,
            made=self.made,
            exported=False,
        )
        processes.barrier()
        command.say(f"verified: all {len(self.wanted)} tensors are the source's")

    def finish(self) -> None:
        """Check the sizes of all files, and write the manifest."""
        facts = {**self.facts, **self.manifest, directory.ORIGIN: origin(self.source)}
        checkpoint.finish(self.target, self.leaves, facts=facts)

    def as_stored(self, dtype: str | None, *, cut: bool) -> "ImportPlan":
        """Return the plan with the dtype and chunks of the finished target, to verify it.

        dtype: the value of --dtype, or None. cut: whether --mesh was given. Raises ValueError if
        the target has another dtype than --dtype, or was made for another mesh than --mesh.
        """
        manifest = checkpoint.verify_whole(self.target)
        if manifest.get(kinds.KINDS) != self.manifest.get(kinds.KINDS):
            raise ValueError(
                f"{self.target} holds other kinds of weights: give --dequantise and --head as when "
                "it was made, or another DST"
            )
        shapes = {path: list(leaf.shape) for path, leaf in self.leaves.items()}
        wanted = kinds.shapes({**self.manifest, "shapes": shapes})
        kinds.check_shapes(self.target, manifest, wanted=wanted)
        stored = manifest["dtype"]
        if dtype not in (None, stored):
            raise ValueError(
                f"{self.target} holds {stored}, not {dtype}: leave out --dtype, or give another DST"
            )
        mesh = {axis: n for axis, n in manifest.get("mesh", {}).items() if n > 1}
        if cut and mesh != {axis: n for axis, n in self.facts["mesh"].items() if n > 1}:
            raise ValueError(
                f"{self.target} is cut for another mesh than --mesh: leave out --mesh, or give "
                "another DST"
            )
        return dataclasses.replace(self, leaves=store.read_leaves(self.params))


def origin(source: Path) -> dict[str, str]:
    """Return the origin of a checkpoint folder, for manifest.json.

    For a folder in the hub's cache, `name` is the model's id and `revision` its commit; otherwise
    `name` is the folder's path.
    """
    found = None if paths.is_remote(source) else _SNAPSHOT.search(source.resolve().as_posix())
    if found:
        return {"name": found["id"].replace("--", "/"), "revision": found["commit"]}
    return {"name": str(paths.absolute(source))}
