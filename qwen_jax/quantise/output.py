"""The model directory that the quantiser writes, block by block, so that a run that was killed can
go on.

`quantisation.json` holds the figures of all blocks that are written, and of the whole model at the
end. `manifest.json` comes last, as in every model directory.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, kinds, store
from qwen_jax.checkpoint.directory import CONFIG, MANIFEST, PARAMS, REPORT, UNFINISHED
from qwen_jax.leaves import int8
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weights import Leaf, Weight
from qwen_jax.meshes import sharding
from qwen_jax.quantise import matrices
from qwen_jax.quantise.algorithm import Scheme
from qwen_jax.quantise.source import Source
from qwen_jax.runtime import lock, paths, processes
from qwen_jax.runtime.texts import read_json

HEAD = "head"


class Output:
    """A model directory that is being written.

    root: the directory.
    source: the float model.
    schemes: the scheme of each matrix that is rounded, by path.
    int8_head: whether the head is stored in int8.
    facts: values that identify the run, so that only the same command goes on with it.
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        *,
        schemes: Mapping[str, Scheme],
        int8_head: bool,
        mesh: Mesh,
        facts: Mapping[str, Any],
    ):
        self.root, self._source, self._schemes = root, source, schemes
        self._layouts = {
            path: matrices.layout(tuple(source.leaves[path].shape), scheme, mesh=mesh)
            for path, scheme in schemes.items()
        }
        self._kinds = {path: f"grouped{scheme.bits}" for path, scheme in schemes.items()}
        if int8_head:
            self._kinds[HEAD] = kinds.INT8
        self._leaves = self._described(mesh)
        self._facts = {
            "made_by": directory.QUANTISED_BY,
            "dtype": source.dtype,
            kinds.KINDS: self._kinds,
            "mesh": sharding.axis_sizes(mesh),
            directory.QUANTISATION: {"biases": [], "metadata": {}},
            # Weights that were trained since are of no checkpoint.
            directory.ORIGIN: {} if source.adapter else directory.origin(source.root),
            "run": dict(facts),
        }

    def _described(self, mesh: Mesh) -> dict[str, store.StoredLeaf]:
        """Return the descriptions of all stored arrays, by path."""
        found: dict[str, store.StoredLeaf] = {}

        def add(path: str, shape: tuple[int, ...], *, dtype: str, place: Any) -> None:
            chunks = store.chunk_shape(place.shard_shape(shape), np.dtype(dtype).itemsize)
            found[path] = store.StoredLeaf(path, shape, chunks, dtype)

        for path, leaf in self._source.leaves.items():
            shape, dtype = tuple(leaf.shape), self._source.dtype
            sizes = self._source.config.sizes
            place = sharding.named(leaf.letters, mesh, lengths=sizes)
            if path in self._layouts:
                for field, (shape, dtype, place) in self._layouts[path].items():
                    add(f"{path}.{field}", shape, dtype=dtype, place=place)
            elif path in self._kinds:
                add(f"{path}.values", shape, dtype="int8", place=place)
                rows = sharding.named(leaf.letters[:1], mesh, lengths=sizes)
                add(f"{path}.scale", shape[:1], dtype="bfloat16", place=rows)
            else:
                add(path, shape, dtype=dtype, place=place)
        return found

    @contextlib.contextmanager
    def begun(self, *, resume: bool) -> Iterator[dict[str, Any]]:
        """Context manager: lock the directory, begin it or go on with it, and yield its figures.

        resume: whether to go on with the same command's unfinished work, if there is any.

        Raises ValueError, and changes nothing, if the directory holds anything else.
        """
        with contextlib.ExitStack() as held:
            figures: dict[str, Any] = {}
            if processes.index() == 0:
                self._check(resume=resume)
                self._held: Callable[[], None] = held.enter_context(lock.alone(self.root))
                if not (self.root / REPORT).exists():  # an earlier start may have begun in part
                    self._begin()
                directory.remove_drafts(self.root)
            processes.barrier()
            if processes.index() and not self._check(resume=True):
                raise ValueError(
                    f"{self.root} is not the folder that process 0 writes to: all hosts need one "
                    "disk, or gs://"
                )
            if (self.root / REPORT).exists():
                figures = read_json(self.root / REPORT)
            yield figures

    def made(self) -> dict[str, Any] | None:
        """Return the figures of this run if it is whole; None if it is not, or is another's."""
        if not (self.root / MANIFEST).exists():
            return None
        if self._differing(checkpoint.verify_whole(self.root)):
            return None
        return read_json(self.root / REPORT)

    def _differing(self, said: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return what a directory says of its run and this run does not: both values, by name."""
        ours = {
            **self._facts["run"],
            "made_by": self._facts["made_by"],
            "mesh": self._facts["mesh"],
        }
        theirs = {**said.get("run", {}), "made_by": said.get("made_by"), "mesh": said.get("mesh")}
        pairs = {key: (theirs.get(key), ours.get(key)) for key in ours | theirs}
        # As texts, because the order of patterns counts: the last one holds.
        return {key: pair for key, pair in pairs.items() if len(set(map(json.dumps, pair))) > 1}

    def _check(self, *, resume: bool) -> bool:
        """Return whether there is work to go on with; ValueError if something else is there."""
        paths.check_name(self.root)
        root, source = (
            path if paths.is_remote(path) else path.resolve()
            for path in (self.root, self._source.root)
        )
        if source in root.parents:
            raise ValueError(f"{self.root} is within {self._source.root}: name another place")
        if (self.root / MANIFEST).exists():
            raise ValueError(
                f"{self.root} is a whole model directory already: name another place, or remove it"
            )
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} exists and is no folder: name another place")
        found = directory.names(self.root)
        if not found:
            return False
        said = read_json(self.root / UNFINISHED) if UNFINISHED in found else {}
        if said.get("made_by") != directory.QUANTISED_BY:
            raise ValueError(
                f"{self.root} holds {sorted(found)[0]}, which no quantisation left there: name an "
                "empty place"
            )
        if not resume:
            raise ValueError(
                f"{self.root} is an unfinished quantisation: add --resume to go on with it, or "
                "remove it"
            )
        if differing := self._differing(said):
            key, (theirs, ours) = next(iter(differing.items()))
            raise ValueError(
                f"{self.root} was begun with {key} {theirs}, not {ours}: give the command that "
                "began it, or another place, or remove it"
            )
        return True

    def _begin(self) -> None:
        """Write all small files but the figures and the manifest."""
        directory.write_json(self.root / UNFINISHED, self._facts)
        for file in directory.carried(self._source.root):
            if file.name not in directory.OF_QUANTISED:
                paths.copy(file, self.root / file.name)
        paths.copy(self._source.root / CONFIG, self.root / CONFIG)
        directory.forget_quantisation(self.root)
        if (settings := self._source.generation_config) is not None:
            paths.copy(settings, self.root / directory.GENERATION_CONFIG)
        store.write_metadata(self.root / PARAMS, self._leaves)

    def write(self, path: str, leaf: Weight | Leaf) -> None:
        """Write one weight, each process its own shards."""
        arrays = {path: leaf} if isinstance(leaf, Weight) else kinds.arrays(path, leaf)

        def write(name: str, weight: Weight) -> None:
            array = weight.get_value()
            store.write_shards(self.root / PARAMS, self._leaves[name], array=array, layer=None)

        # A mesh is set per thread, and shards, which are arrays of one device, are written without.
        with store.one_line(self.root, "written"), ThreadPoolExecutor() as executor:
            for done in [executor.submit(write, *each) for each in arrays.items()]:
                done.result()

    def rounded(self, path: str) -> Grouped:
        """Read a rounded matrix that an earlier start of this run wrote."""
        with store.one_line(self.root, "read"):
            arrays = {
                field: store.restore(
                    self.root / PARAMS,
                    f"{path}.{field}",
                    shape=stored.shape,
                    dtype=np.dtype(stored.dtype),
                    place=stored.place,
                )
                for field, stored in self._layouts[path].items()
            }
        return matrices.leaf_of(arrays, self._schemes[path])

    def note(self, figures: Mapping[str, Any]) -> None:
        """Write the figures, after all that they are about is written by every process."""
        processes.barrier()
        if processes.index() == 0:
            directory.write_json(self.root / REPORT, figures)

    def finish(self) -> None:
        """Check the sizes of all files, and mark the directory as complete."""
        processes.barrier()
        if processes.index() == 0:
            self._held()
            checkpoint.finish(self.root, self._leaves, facts=self._facts)
        processes.barrier()


@jax.jit
def int8_head(head: Weight) -> Int8[Weight]:
    """Round a head [V, D] to int8, with bfloat16 scales, and leave it as it is."""
    made = int8.quantize(head[...], scale_dtype=jnp.bfloat16)
    return Int8(
        Weight(made.values, letters=head.letters), Weight(made.scale, letters=head.letters[:-1])
    )
