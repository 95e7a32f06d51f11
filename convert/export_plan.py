"""The plan of an export to a Hugging Face checkpoint folder: the files to write, and how."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import ClassVar

import numpy as np

from convert import copying, folder, names, target
from convert import verify as verification
from convert.conversion import Conversion, Remaining
from convert.copying import Change, Job
from qwen_jax.checkpoint import directory, safetensors_header, store
from qwen_jax.runtime import command, paths, processes
from qwen_jax.runtime.texts import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPlan(Conversion):
    """The plan of an export to a Hugging Face checkpoint folder, whose input has been checked.

    wanted: the tensors to write, by name.
    leaves: the stored leaves that hold their values, by path.
    shards: for each safetensors file, the names of its tensors in order.
    dtype: the dtype of all tensors.
    changes: functions that merge an adapter into leaves, by leaf path (`peft.changes`).
    settings: the adapter's generation_config.json, or None.
    """

    wanted: dict[str, names.Expected]
    leaves: dict[str, store.StoredLeaf]
    shards: dict[str, list[str]]
    dtype: str
    changes: dict[str, Change]
    settings: Path | None
    # A file's length tells how far it has come, so it is written front to back.
    workers: ClassVar[int] = 1

    @property
    def params(self) -> Path:
        """The folder of the source's arrays."""
        return self.source / directory.PARAMS

    def remaining(self, resumed: bool) -> Remaining:
        """Return what is left to copy; of n processes, each writes every n-th safetensors file.

        resumed: whether the drafts of an earlier start are continued.
        """
        done = needed = 0
        jobs: list[Job] = []
        for number, file in enumerate(self.shards):
            there, left = self._jobs(file, resumed)
            done += there
            needed += sum(size for size, _ in left)
            if number % processes.count() == processes.index():
                jobs += left
        return Remaining(done, needed, jobs)

    def _jobs(self, file: str, resumed: bool) -> tuple[int, list[Job]]:
        """Return how many bytes of a safetensors file are written, and the jobs left, in order.

        file: the file's name. resumed: whether to go on with the file as an interrupted export left
        it.
        """
        whole = self.target / file
        # The name is the same in every process, so that a stopped export can be continued. The file
        # is never shortened, so two exports that no lock keeps apart write the same bytes.
        draft = whole.with_name(f"{file}.tmp")
        head, bands, sizes = self._layout(file)
        if whole.exists() and paths.size(whole) == len(head) + sum(sizes):
            return sum(sizes), []
        if paths.is_remote(whole):  # an object cannot be appended to: a file is one job
            return 0, [(sum(sizes), functools.partial(self._upload, whole, head=head, bands=bands))]
        written = draft.stat().st_size if resumed and draft.exists() else 0
        jobs: list[Job] = []
        if written < len(head):
            jobs.append((0, functools.partial(_write_head, draft, head)))
        done, position = 0, len(head)
        for band, size in zip(bands, sizes, strict=True):
            if position + size <= written:
                done += size
            else:
                append = functools.partial(self._append, draft, position=position, band=band)
                jobs.append((size, append))
            position += size
        jobs.append((0, functools.partial(draft.replace, whole)))
        return done, jobs

    def _layout(self, file: str) -> tuple[bytes, list[store.Band], list[int]]:
        """Return a safetensors file's header, the bands that follow it, and the bytes of each."""
        shapes = {name: self.wanted[name].shape for name in self.shards[file]}
        bands = [
            band
            for name in shapes
            for part in self.wanted[name].parts
            for band in self.leaves[part.path].bands()
        ]
        sizes = [band.rows * band.row_elements * store.ITEM_BYTES[self.dtype] for band in bands]
        return safetensors_header.header(shapes, self.dtype), bands, sizes

    def _upload(self, file: Path, *, head: bytes, bands: list[store.Band]) -> None:
        """Write a whole file to object storage."""
        with paths.writer(file) as stream:
            copying.write(stream, np.frombuffer(head, np.uint8))
            for band in bands:
                self._export(band, stream)

    def _append(self, draft: Path, *, position: int, band: store.Band) -> None:
        """Write a band to a draft at `position`, which is the draft's end or before it."""
        with open(draft, "r+b", buffering=0) as stream:
            if stream.seek(0, os.SEEK_END) < position:
                raise ValueError(f"{draft} has been changed by someone else: remove it")
            stream.seek(position)  # a band that was cut short is written again from its beginning
            self._export(band, stream.fileno())

    def _export(self, band: store.Band, stream: copying.Target) -> None:
        """Append a band to an open file, with the adapter merged into it if there is one."""
        change = self.changes.get(band.leaf.path)
        copying.export_band(band, self.params, target=stream, dtype=self.dtype, change=change)

    def begin(self) -> None:
        """Write config.json, in which the dtype is corrected if the tensors have another one.

        Also writes the adapter's generation_config.json, if there is one, because an adapter can
        turn a base model into a chat model.
        """
        if self.settings is not None:
            paths.copy(self.settings, self.target / directory.GENERATION_CONFIG)
        source, copied = self.source / directory.CONFIG, self.target / directory.CONFIG
        values = read_json(source)
        stale = [k for k in ("torch_dtype", "dtype") if values.get(k, self.dtype) != self.dtype]
        if stale:
            directory.write_json(copied, values | dict.fromkeys(stale, self.dtype))
        else:
            paths.copy(source, copied)

    def copied(self) -> None:
        """Write the index, which names the file of each tensor, if there are several files."""
        if len(self.shards) == 1:
            return
        sizes = [math.prod(tensor.shape) for tensor in self.wanted.values()]
        index = {
            "metadata": {"total_size": sum(sizes) * store.ITEM_BYTES[self.dtype]},
            "weight_map": {name: file for file, held in self.shards.items() for name in held},
        }
        directory.write_json(self.target / folder.INDEX, index)

    def verify(self) -> None:
        """Compare every tensor of the target with the source; ValueError if any differs."""
        verification.verify(
            self.params,
            self.leaves,
            tensors=folder.read(self.target),
            wanted=self.wanted,
            exported=True,
            changes=self.changes,
        )
        processes.barrier()
        merged = ", the adapter merged into them" if self.changes else ""
        command.say(f"verified: all {len(self.wanted)} tensors are the source's{merged}")

    def finish(self) -> None:
        """Mark the target as complete; ValueError unless every file exists and has its size."""
        wanted = {}
        for file in self.shards:
            head, _, sizes = self._layout(file)
            wanted[file] = len(head) + sum(sizes)
        files = [self.target / file for file in wanted]
        found = {file.name: paths.size(file) for file in files if file.exists()}
        if problems := directory.differences(found, wanted):
            raise ValueError(
                f"{self.target} was not written as it should be: {problems}; write it again"
            )
        target.complete(self.target)


def _write_head(file: Path, content: bytes) -> None:
    """Write the first bytes of a file, which need not exist."""
    file.touch()
    with open(file, "r+b") as stream:
        stream.write(content)


def split(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Distribute tensors, in order, over files of at most `limit` bytes, or of one larger tensor.

    sizes: the bytes of each tensor, by name. Returns the tensors' names by file name.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}
