"""The files of a token cache: examples stored one behind the other, and memory-mapped to read.

    ids.u4        uint32 [tokens], the ids of all examples
    trained.b1    bool [tokens], whether each id is trained; missing if all are
    ends.i8       int64 [examples], where each example ends in `ids`
    counts.json   written last: the counts of records, examples and tokens

Knows no records, tokenizers or processes; never holds more than a few examples in memory.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int, Shaped, UInt

from qwen_jax.runtime import paths

_IDS, _ENDS, _FLAGS, _COUNTS = "ids.u4", "ends.i8", "trained.b1", "counts.json"
ID, FLAG, _END = np.dtype("<u4"), np.dtype("?"), np.dtype("<i8")
_HELD = 2**22  # tokens of an example that are in memory before it ends


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the records that a token cache was made from, in numbers.

    records: the number of records read. A long text is one record, and is cut, dropped or bad as a
        whole.
    examples, tokens: the numbers of examples kept, and of their tokens.
    trained: the number of these tokens that are trained.
    cut, dropped: the numbers of records that were too long, and were cut or left out.
    bad: the number of records that could not be used.
    problems: descriptions of the first bad records.
    digest: a hash of the examples, independent of where the data files are.
    """

    records: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    problems: tuple[str, ...] = ()
    digest: str = ""


class TokenCache:
    """A random-access sequence of examples: `cache[i]` is (ids, whether each is trained), both [n].

    counts: what became of the records that the cache was made from.
    ids: uint32 [tokens], memory-mapped: all examples, one behind the other.
    trained: bool [tokens], memory-mapped: whether each id is trained; None if all are.
    ends: int64 [examples], memory-mapped: where each example ends in `ids`.
    lengths: int64 [examples], computed on access: the number of ids in each example.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts = _counts(folder)
        self.ends = mapped(folder / _ENDS, _END)
        self.ids = mapped(folder / _IDS, ID)
        flags = folder / _FLAGS
        self.trained = mapped(flags, FLAG) if flags.exists() else None

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """The number of ids in each example, int64 [examples]."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, index: int) -> tuple[UInt[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        part = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        ids = np.asarray(self.ids[part])
        if self.trained is None:  # a view of one value, as a long document would take much memory
            return ids, np.broadcast_to(True, len(ids))
        return ids, self.trained[part]


def mapped(path: Path, dtype: npt.DTypeLike) -> Shaped[np.ndarray, " n"]:
    """Open a file as a memory-mapped array, whose values are read from disk on access."""
    if path.stat().st_size == 0:  # no system maps an empty file
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


def _counts(folder: Path) -> Counts:
    """Read the counts of a cache."""
    return Counts(**json.loads((folder / _COUNTS).read_text(encoding="utf-8")))


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a token cache with files of the sizes that its counts imply."""
    try:
        counts = _counts(folder)
        sizes = {_IDS: counts.tokens * ID.itemsize, _ENDS: counts.examples * _END.itemsize}
        if counts.trained < counts.tokens:
            sizes[_FLAGS] = counts.tokens
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, TypeError):
        return False


def write_counts(folder: Path, counts: Counts) -> None:
    """Write counts.json, which marks the files of a token cache as complete."""
    paths.write(folder / _COUNTS, json.dumps(dataclasses.asdict(counts)).encode())


class Writer:
    """Writes the files of a token cache, example after example; a long example comes in pieces.

    tokens, trained, examples: the numbers of tokens, trained tokens and examples kept so far.
    digest: the hash of the examples kept so far.
    learned: the number of trained tokens in the current example.
    """

    def __init__(self, folder: Path):
        self._ids, self._flags, self._ends = (
            open(folder / name, "w+b")  # noqa: SIM115 (closed by `close`)
            for name in (_IDS, _FLAGS, _ENDS)
        )
        self.tokens = self.trained = self.examples = 0
        self.digest = hashlib.sha256()
        self._next()

    def _next(self) -> None:
        """Begin a new example."""
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = self._written = self.learned = 0

    def add(self, ids: UInt[np.ndarray, " n"], learned: Bool[np.ndarray, " n"]) -> None:
        """Add a piece to the current example: ids [n], and whether each of them is trained."""
        self._held.append((ids, learned))
        self._size += len(ids)
        self.learned += int(np.count_nonzero(learned))
        if self._size - self._written > _HELD:
            self._write()

    def _write(self) -> None:
        """Write the pieces that are in memory."""
        for ids, learned in self._held:
            self._ids.write(ids.data)
            self._flags.write(learned.data)
        self._held, self._written = [], self._size

    def keep(self) -> None:
        """End the current example and keep it."""
        self.digest.update(b"%d " % self._size)
        if not self._written:
            for part in zip(*self._held, strict=True):
                for piece in part:
                    self.digest.update(piece.data)
            self._write()
        else:  # the example was too long for memory: read it again
            self._write()
            for file, dtype in ((self._ids, ID), (self._flags, FLAG)):
                file.flush()
                at = self.tokens * dtype.itemsize
                self.digest.update(np.memmap(file, dtype, "r", at, self._size).data)
        self.tokens += self._size
        self.trained += self.learned
        self.examples += 1
        self._ends.write(_END.type(self.tokens).tobytes())
        self._next()

    def discard(self) -> None:
        """Drop the current example."""
        if self._written:
            for file, dtype in ((self._ids, ID), (self._flags, FLAG)):
                file.seek(self.tokens * dtype.itemsize)
                file.truncate()
        self._next()

    def append(self, cache: TokenCache) -> None:
        """Append all examples of another cache."""
        if not len(cache):
            return
        maps = []
        for file, dtype, name in ((self._ids, ID, _IDS), (self._flags, FLAG, _FLAGS)):
            if (cache.folder / name).exists():
                with open(cache.folder / name, "rb") as part:
                    shutil.copyfileobj(part, file, 2**20)
            else:
                for at in range(0, cache.counts.tokens, 2**20):
                    file.write(b"\1" * min(2**20, cache.counts.tokens - at))
            file.flush()
            size = cache.counts.tokens * dtype.itemsize
            at = self.tokens * dtype.itemsize
            maps.append(np.memmap(file, "u1", "r", at, size).data if size else memoryview(b""))
        ids, flags = maps
        begin = 0
        for at in range(0, len(cache), 2**16):
            for end in cache.ends[at : at + 2**16].tolist():
                self.digest.update(b"%d " % (end - begin))
                self.digest.update(ids[begin * ID.itemsize : end * ID.itemsize])
                self.digest.update(flags[begin:end])
                begin = end
            self._ends.write((cache.ends[at : at + 2**16] + self.tokens).astype(_END).data)
        self.tokens += cache.counts.tokens
        self.trained += cache.counts.trained
        self.examples += len(cache)

    def close(self) -> None:
        """Close the files."""
        for file in (self._ids, self._flags, self._ends):
            file.close()


def closed(folder: Path, writer: Writer, *, found: Mapping[str, Any]) -> Counts:
    """Close the files of a writer, and return the counts of the token cache that they make up.

    found: the numbers of records that were read, cut, dropped or bad, by their names in `Counts`.
    """
    writer.close()
    if writer.trained == writer.tokens:
        (folder / _FLAGS).unlink()
    return Counts(
        **found,
        examples=writer.examples,
        tokens=writer.tokens,
        trained=writer.trained,
        digest=writer.digest.hexdigest(),
    )


def merge(folder: Path, caches: Iterable[TokenCache]) -> Counts:
    """Write the examples of several token caches into a folder, one cache behind the other.

    Files and digest are the same as if all records had been encoded at once. Returns the counts.
    """
    found: collections.Counter[str] = collections.Counter()
    with contextlib.closing(Writer(folder)) as writer:
        for cache in caches:
            writer.append(cache)
            for name in ("records", "cut", "dropped", "bad"):
                found[name] += getattr(cache.counts, name)
        return closed(folder, writer, found=found)
