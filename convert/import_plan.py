"""The plan of a conversion into a model directory: what is read, written, verified and recorded."""

import dataclasses
import functools
import re
from pathlib import Path

from convert import copying, names, shares
from convert import verify as verification
from convert.conversion import Conversion, Remaining
from convert.copying import Job
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, store
from qwen_jax.checkpoint.safetensors_header import Tensor
from qwen_jax.runtime import command, paths, processes

# A model in the cache of the Hugging Face hub's library.
_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPlan(Conversion):
    """The plan of a conversion into a model directory, whose input has been checked.

    tensors: the location of each tensor in the checkpoint, by name.
    wanted: the leaves that each of these tensors holds, by the tensor's name.
    leaves: the layout of each leaf in the model directory, by path.
    partitions: for each leaf, the mesh axes that divide each of its axes.
    """

    tensors: dict[str, Tensor]
    wanted: dict[str, names.Expected]
    leaves: dict[str, store.StoredLeaf]
    partitions: dict[str, shares.Partition]

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
        for tensor, expected in zip(self.tensors.values(), self.wanted.values(), strict=True):
            for part in expected.parts:
                offset = tensor.offset + part.start * store.ITEM_BYTES[tensor.dtype]
                for band in self.leaves[part.path].bands():
                    mine = share.of(processes.index(), band)
                    piece = band.chunk_elements * store.ITEM_BYTES[band.leaf.dtype]
                    where = f"{directory.PARAMS}/{part.path}"
                    there = {name for name in band.pieces if found.get(f"{where}/{name}") == piece}
                    lacking = band.pieces.keys() - there
                    needed += piece * len(lacking)
                    done += piece * len(there)
                    if todo := {name: at for name, at in mine.items() if name in lacking}:
                        rest = dataclasses.replace(band, pieces=todo)
                        source = {"file": tensor.file, "offset": offset, "dtype": tensor.dtype}
                        job = functools.partial(copying.import_band, rest, self.params, **source)
                        jobs.append((piece * len(todo), job))
        return Remaining(done, needed, jobs)

    def begin(self) -> None:
        """Write config.json and the metadata of the arrays."""
        paths.copy(self.source / directory.CONFIG, self.target / directory.CONFIG)
        store.write_metadata(self.params, self.leaves)

    def verify(self) -> None:
        """Compare every tensor of the target with the source; ValueError if any differs."""
        verification.verify(
            self.params, self.leaves, tensors=self.tensors, wanted=self.wanted, exported=False
        )
        processes.barrier()
        command.say(f"verified: all {len(self.wanted)} tensors are the source's")

    def finish(self) -> None:
        """Check the sizes of all files, and write the manifest."""
        facts = {**self.facts, directory.ORIGIN: origin(self.source)}
        checkpoint.finish(self.target, self.leaves, facts=facts)

    def as_stored(self, dtype: str | None, *, cut: bool) -> "ImportPlan":
        """Return the plan with the dtype and chunks of the finished target, to verify it.

        dtype: the value of --dtype, or None. cut: whether --mesh was given. Raises ValueError if
        the target has another dtype than --dtype, or was made for another mesh than --mesh.
        """
        manifest = checkpoint.verify_whole(self.target)
        shapes = {path: leaf.shape for path, leaf in self.leaves.items()}
        directory.check_shapes(self.target, manifest, wanted=shapes)
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
        return dataclasses.replace(self, leaves=store.read_leaves(self.params, stored))


def origin(source: Path) -> dict[str, str]:
    """Return the origin of a checkpoint folder, for manifest.json.

    For a folder in the hub's cache, `name` is the model's id and `revision` its commit; otherwise
    `name` is the folder's path.
    """
    found = None if paths.is_remote(source) else _SNAPSHOT.search(source.resolve().as_posix())
    if found:
        return {"name": found["id"].replace("--", "/"), "revision": found["commit"]}
    return {"name": str(paths.absolute(source))}
