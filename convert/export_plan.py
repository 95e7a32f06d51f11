"""The plan of an export to a Hugging Face checkpoint folder: the files to write, and how."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from convert import copying, folder, names, target
from convert import verify as verification
from convert.conversion import Conversion, Remaining
from convert.copying import Job, Made
from qwen_jax.checkpoint import directory, safetensors_header, store
from qwen_jax.checkpoint.store import Change
from qwen_jax.runtime import command, paths, processes
from qwen_jax.runtime.texts import read_json


class Section(NamedTuple):
    """A run of bytes in a safetensors file: how many, and the function that appends them."""

    size: int
    write: Callable[[copying.Target], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPlan(Conversion):
    """The plan of an export to a Hugging Face checkpoint folder, whose input has been checked.

    wanted: the tensors to write, by name.
    made: functions that compute the rows of tensors that hold no leaf as it is, by name.
    leaves: the stored leaves that hold their values, by path.
    shards: for each safetensors file, the names of its tensors in order.
    dtype: the dtype of tensors of floats.
    dtypes: the dtype of each tensor, by name.
    config: entries to add to config.json.
    metadata: notes for the header of each file.
    changes: functions that merge an adapter into leaves, by leaf path (`peft.changes`).
    settings: the adapter's generation_config.json, or None.
    """

    wanted: dict[str, names.Expected]
    made: dict[str, Made]
    leaves: dict[str, store.StoredLeaf]
    shards: dict[str, list[str]]
    dtype: str
    dtypes: dict[str, str]
    config: dict[str, Any]
    metadata: dict[str, str]
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
        head, sections = self._layout(file)
        size = sum(section.size for section in sections)
        if whole.exists() and paths.size(whole) == len(head) + size:
            return size, []
        if paths.is_remote(whole):  # an object cannot be appended to: a file is one job
            return 0, [(size, functools.partial(_upload, whole, head=head, sections=sections))]
        written = draft.stat().st_size if resumed and draft.exists() else 0
        jobs: list[Job] = []
        if written < len(head):
            jobs.append((0, functools.partial(_write_head, draft, head)))
        done, position = 0, len(head)
        for section in sections:
            if position + section.size <= written:
                done += section.size
            else:
                append = functools.partial(_append, draft, position=position, section=section)
                jobs.append((section.size, append))
            position += section.size
        jobs.append((0, functools.partial(draft.replace, whole)))
        return done, jobs

    def _layout(self, file: str) -> tuple[bytes, list[Section]]:
        """Return a safetensors file's header, and the sections that follow it."""
        shapes = {name: self.wanted[name].shape for name in self.shards[file]}
        sections = [section for name in shapes for section in self._sections(name)]
        return safetensors_header.header(shapes, self.dtypes, metadata=self.metadata), sections

    def _sections(self, name: str) -> Iterator[Section]:
        """Yield the sections of a tensor: a band of a leaf each, or a block of computed rows."""
        tensor, dtype = self.wanted[name], self.dtypes[name]
        item = store.ITEM_BYTES[dtype]
        if name in self.made:
            row_bytes = math.prod(tensor.shape[1:]) * item
            step = max(1, copying.BLOCK_BYTES // row_bytes)
            for first in range(0, tensor.shape[0], step):
                count = min(step, tensor.shape[0] - first)
                write = functools.partial(self._make, name, first, count)
                yield Section(count * row_bytes, write)
            return
        for part in tensor.parts:
            for band in self.leaves[part.path].bands():
                write = functools.partial(self._export, band, dtype)
                yield Section(band.rows * band.row_elements * item, write)

    def _make(self, name: str, first: int, count: int, stream: copying.Target) -> None:
        """Append computed rows of a tensor to an open file."""
        rows = self.made[name](first, count)
        copying.write(stream, copying.cast(rows, self.dtypes[name], name=name))

    def _export(self, band: store.Band, dtype: str, stream: copying.Target) -> None:
        """Append a band to an open file, with the adapter merged into it if there is one."""
        change = self.changes.get(band.leaf.path)
        copying.export_band(band, self.params, target=stream, dtype=dtype, change=change)

    def begin(self) -> None:
        """Write config.json, in which the dtype is corrected if the tensors have another one.

        Also writes the adapter's generation_config.json, if there is one, because an adapter can
        turn a base model into a chat model.
        """
        if self.settings is not None:
            paths.copy(self.settings, self.target / directory.GENERATION_CONFIG)
        copied = self.target / directory.CONFIG
        paths.copy(self.source / directory.CONFIG, copied)
        if self.facts.get("dequantise"):
            directory.forget_quantisation(self.target)
        values = read_json(copied)
        stale = [k for k in ("torch_dtype", "dtype") if values.get(k, self.dtype) != self.dtype]
        if stale or self.config:
            directory.write_json(copied, values | dict.fromkeys(stale, self.dtype) | self.config)

    def copied(self) -> None:
        """Write the index, which names the file of each tensor, if there are several files."""
        if len(self.shards) == 1:
            return
        sizes = [
            math.prod(tensor.shape) * store.ITEM_BYTES[self.dtypes[name]]
            for name, tensor in self.wanted.items()
        ]
        index = {
            "metadata": {"total_size": sum(sizes)},
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
            made=self.made,
        )
        processes.barrier()
        merged = ", the adapter merged into them" if self.changes else ""
        command.say(f"verified: all {len(self.wanted)} tensors are the source's{merged}")

    def finish(self) -> None:
        """Mark the target as complete; ValueError unless every file exists and has its size."""
        wanted = {}
        for file in self.shards:
            head, sections = self._layout(file)
            wanted[file] = len(head) + sum(section.size for section in sections)
        files = [self.target / file for file in wanted]
        found = {file.name: paths.size(file) for file in files if file.exists()}
        if problems := directory.differences(found, wanted):
            raise ValueError(
                f"{self.target} was not written as it should be: {problems}; write it again"
            )
        target.complete(self.target)


def _upload(file: Path, *, head: bytes, sections: list[Section]) -> None:
    """Write a whole file to object storage."""
    with paths.writer(file) as stream:
        copying.write(stream, np.frombuffer(head, np.uint8))
        for section in sections:
            section.write(stream)


def _append(draft: Path, *, position: int, section: Section) -> None:
    """Write a section to a draft at `position`, which is the draft's end or before it."""
    with open(draft, "r+b", buffering=0) as stream:
        if stream.seek(0, os.SEEK_END) < position:
            raise ValueError(f"{draft} has been changed by someone else: remove it")
        stream.seek(position)  # a section that was cut short is written again from its beginning
        section.write(stream.fileno())


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
