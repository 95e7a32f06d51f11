"""Packs examples into rows of a fixed length, and serves the rows as a training step takes them.

Rows depend on the examples, the length and the seed alone, not on the mesh or the number of
processes. A packing is computed once, stored beside the tokens, and memory-mapped afterwards.
"""

import array
import bisect
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from qwen_jax.runtime import paths
from train.data.batch import Batch
from train.data.token_cache import appear
from train.data.token_files import TokenCache, mapped

_OPEN = 256  # rows that an example may still join
_AT_A_TIME = 2**18  # examples that are processed together
_VERSION = 1  # of stored packings; to be raised when `joined`, `fitted` or the files change
_KEPT = 8  # stored packings of a cache; a run has two, for training and for held-out examples
_FACTS, _ORDER, _ORDER_DTYPE = "facts.json", "order", "<u4"
# A piece is not longer than its row; a document may have any length.
_DTYPES = {"example": "<u4", "start": "<i8", "length": "<u4", "first": "<i8"}
Numbers = Integer[np.ndarray, " examples"]
_OfPieces = Integer[np.ndarray, " pieces"]
# (example, start, length) of pieces that follow each other, and whether each begins a row.
_Block = tuple[_OfPieces, _OfPieces, _OfPieces, Bool[np.ndarray, " pieces"]]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The contents of packed rows: which part of which example is where in each row.

    A row is filled with pieces of examples. The arrays list the pieces of all rows, row after row.

    example: uint32 [pieces], the index of the piece's example.
    start: int64 [pieces], the index of the piece's first token in its example.
    length: uint32 [pieces], the number of its tokens.
    first: int64 [rows + 1], the index of each row's first piece, then the number of pieces.
    """

    example: _OfPieces
    start: _OfPieces
    length: _OfPieces
    first: Integer[np.ndarray, " starts"]


def joined(lengths: Numbers, row: int, *, folder: Path | None = None) -> Pieces:
    """Join all examples end to end, and cut them into rows of `row` tokens.

    An incomplete last row is dropped, unless it is the only one. lengths: int [examples], the
    tokens of each example. folder: where the pieces are written and memory-mapped; None keeps them
    in memory.
    """
    return _collected(_joined(lengths, row), folder)


def _joined(lengths: Numbers, row: int) -> Iterator[_Block]:
    """Yield the pieces of which `joined` makes its rows, in a block for each `_AT_A_TIME` examples.

    lengths: int [examples], the tokens of each example. row: the tokens of a row.
    """
    total = int(lengths.sum(dtype=np.int64))
    total = min(total, max(1, total // row) * row)
    begin = 0  # the number of tokens before the block
    for at in range(0, len(lengths), _AT_A_TIME):
        ends = begin + np.cumsum(lengths[at : at + _AT_A_TIME], dtype=np.int64)
        end = min(int(ends[-1]), total)
        # Pieces begin where an example or a row does.
        examples = np.concatenate([[begin], ends[:-1]])
        rows = np.arange(-(-begin // row) * row, end, row)
        begins = np.sort(np.concatenate([examples[examples < end], rows]), kind="stable")
        begins = begins[np.diff(begins, prepend=-1) > 0]
        example = np.searchsorted(ends, begins, side="right")
        # An example without tokens begins where the next does, and gets no piece.
        start = begins - np.concatenate([[begin], ends])[example]
        yield example + at, start, np.diff(begins, append=end), begins % row == 0
        begin = int(ends[-1])
        if begin >= total:
            return


def fitted(lengths: Numbers, row: int, *, folder: Path | None = None) -> Pieces:
    """Pack whole examples into rows of `row` tokens, each into the fullest open row that has room.

    The arguments are those of `joined`; no example has more than `row` tokens.
    """
    return _collected(_whole(*_fit(lengths, row), lengths=lengths), folder)


def _fit(lengths: Numbers, row: int) -> tuple[Numbers, Integer[np.ndarray, " rows"]]:
    """Return the indices of the examples sorted by row, and the number of examples in each row.

    lengths: int [examples], the tokens of each example. row: the tokens of a row. The open rows are
    a sorted list of integers `room * _OPEN + place`, where room is a row's number of free tokens.
    The first integer that is large enough is the row with the least sufficient room; of rows with
    equal room it is the one of lowest place.
    """
    members = np.empty(len(lengths), np.uint32)  # each example's row, in order of opening
    row_at = list(range(_OPEN))
    rooms = [row * _OPEN + place for place in range(_OPEN)]
    closed = array.array("I")
    opened = _OPEN
    for at in range(0, len(lengths), _AT_A_TIME):
        block = lengths[at : at + _AT_A_TIME].tolist()
        for i, length in enumerate(block):
            found = bisect.bisect_left(rooms, length * _OPEN)
            if found < len(rooms):
                room, place = divmod(rooms.pop(found), _OPEN)
            else:
                room, place = row, rooms.pop(0) % _OPEN
                closed.append(row_at[place])
                row_at[place], opened = opened, opened + 1
            bisect.insort(rooms, (room - length) * _OPEN + place)
            block[i] = row_at[place]
        members[at : at + len(block)] = block
    counts = np.bincount(members, minlength=opened)
    order = np.concatenate([np.frombuffer(closed, np.uint32), np.array(row_at, np.uint32)])
    order = order[counts[order] > 0]
    number = np.empty(opened, np.uint64)
    number[order] = np.arange(len(order))
    # Sort examples by row, and within a row by number, without a second array of their size.
    keys = number[members]
    for at in range(0, len(keys), _AT_A_TIME):
        block = keys[at : at + _AT_A_TIME]
        block <<= np.uint64(32)
        block |= np.arange(at, at + len(block), dtype=np.uint64)
    keys.sort()
    return keys.astype(np.uint32), counts[order]


def alone(lengths: Numbers, row: int, *, folder: Path | None = None) -> Pieces:
    """Give each example a row of its own.

    lengths: int [examples], the tokens of each example. folder: where the pieces are written and
    memory-mapped; None keeps them in memory.
    """
    counts = np.broadcast_to(1, len(lengths))
    return _collected(_whole(np.arange(len(lengths)), counts, lengths=lengths), folder)


def _whole(
    examples: Numbers,
    counts: Integer[np.ndarray, " rows"],
    *,
    lengths: Numbers,
) -> Iterator[_Block]:
    """Yield blocks of pieces for rows that hold whole examples.

    examples: the indices of the examples, sorted by row. counts: the number of examples in each
    row. lengths: int [examples], the tokens of each example.
    """
    first = np.zeros(len(examples), bool)
    first[np.cumsum(counts) - counts] = True
    for at in range(0, len(examples), _AT_A_TIME):
        example = examples[at : at + _AT_A_TIME]
        none = np.zeros(len(example), np.int64)
        yield example, none, lengths[example], first[at : at + len(example)]


def _collected(blocks: Iterable[_Block], folder: Path | None) -> Pieces:
    """Concatenate blocks of pieces into `Pieces`, in files of `folder` or (None) in memory."""
    count = 0
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {
            name: io.BytesIO() if folder is None else stack.enter_context(open(folder / name, "wb"))
            for name in _DTYPES
        }
        for example, start, length, begins in blocks:
            first = count + np.flatnonzero(begins)
            values = {"example": example, "start": start, "length": length, "first": first}
            for name, file in files.items():
                file.write(values[name].astype(_DTYPES[name]).data)
            count += len(begins)
        files["first"].write(np.array([count], _DTYPES["first"]).data)
    if folder is not None:
        return _mapped(folder)
    return Pieces(**{n: np.frombuffer(files[n].getbuffer(), _DTYPES[n]) for n in _DTYPES})


def _mapped(folder: Path) -> Pieces:
    """Open the pieces in the files of a folder as memory-mapped arrays."""
    return Pieces(**{name: mapped(folder / name, _DTYPES[name]) for name in _DTYPES})


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file of a stored packing, by name."""
    return {name: (folder / name).stat().st_size for name in (_ORDER, *_DTYPES)}


def _is_whole(folder: Path) -> bool:
    """Return whether all files of a stored packing have their sizes."""
    try:
        return json.loads((folder / _FACTS).read_text(encoding="utf-8")) == _sizes(folder)
    except (FileNotFoundError, ValueError):
        return False


def _used_now(folder: Path) -> None:
    """Set the time of last use of a packing's folder, by which `_tidy` chooses packings to keep."""
    now = time.time_ns()
    with contextlib.suppress(OSError):  # it does not exist yet, or is another user's
        os.utime(folder, ns=(now, now))


def _tidy(cache: Path) -> None:
    """Remove a token cache's packings except the last used; open mappings of them stay valid."""
    kept = [path for path in cache.glob("rows-*") if path.is_dir() and not path.suffix]
    with contextlib.suppress(FileNotFoundError):  # another process is doing the same
        kept.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in kept[:-_KEPT]:
            shutil.rmtree(path, ignore_errors=True)


class Rows:
    """A random-access sequence of packed training rows: `rows[i]` is a Batch of [length] arrays.

    cache: the token cache that holds the examples.
    length: the number of tokens in a row.
    pack: "joined" (examples end to end, cut at row ends), "fitted" (as many whole examples in a row
        as fit), or "alone" (one example in each row).
    seed: the seed of the shuffle before packing.
    examples: the indices of the examples to use; None for all.
    fingerprint: identifies the set of examples in the rows, whatever their packing.

    The packing is stored in the cache's folder under a hash of all that it depends on. It is built
    again if a file's size is wrong; only the packings used last are kept.
    """

    def __init__(
        self,
        cache: TokenCache,
        length: int,
        *,
        pack: str,
        seed: int = 0,
        examples: Numbers | None = None,
    ):
        self._cache, self._length = cache, length
        self.fingerprint = f"{cache.counts.digest[:32]}-{_checksum(examples, len(cache)):08x}"
        known = hashlib.sha256(json.dumps([_VERSION, pack, length, seed]).encode())
        known.update(b"all" if examples is None else np.ascontiguousarray(examples, np.int64).data)
        known.update(cache.ends.data)
        folder = cache.folder / f"rows-{known.hexdigest()[:32]}"
        make = {"joined": joined, "fitted": fitted, "alone": alone}[pack]

        def fill(draft: Path) -> None:
            order = np.arange(len(cache), dtype=np.uint32) if examples is None else examples
            order = order.astype(_ORDER_DTYPE)
            np.random.default_rng(seed).shuffle(order)
            lengths = cache.lengths[order]
            if pack != "joined" and lengths.max() > length:
                raise ValueError(f"an example has {lengths.max()} tokens, a row {length}")
            order.tofile(draft / _ORDER)
            make(lengths, length, folder=draft)
            paths.write(draft / _FACTS, json.dumps(_sizes(draft)).encode())

        _used_now(folder)
        appear(folder, _is_whole, fill=fill)
        self._order = mapped(folder / _ORDER, _ORDER_DTYPE)
        self._pieces = _mapped(folder)
        _used_now(folder)
        _tidy(cache.folder)

    def __len__(self) -> int:
        return len(self._pieces.first) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows, without padding."""
        return int(self._pieces.length.sum(dtype=np.int64))

    @property
    def longest(self) -> int:
        """The number of tokens in the longest piece of any row."""
        return int(self._pieces.length.max())

    @property
    def efficiency(self) -> float:
        """The share of all token positions in rows that hold a token rather than padding."""
        return self.tokens / (len(self) * self._length)

    def __getitem__(self, index: int) -> Batch:
        ids, targets, positions, segments = np.zeros((4, self._length), np.int32)
        weights = np.zeros(self._length, np.float32)
        at = 0
        pieces = range(*self._pieces.first[index : index + 2])
        for number, i in enumerate(pieces, 1):
            start, count = int(self._pieces.start[i]), int(self._pieces.length[i])
            tokens, learned = self._cache[int(self._order[self._pieces.example[i]])]
            own = slice(at, at + count)
            ids[own] = tokens[start : start + count]
            positions[own] = np.arange(count)
            segments[own] = number
            # If a piece goes on in the next row, its last token's target is the first token there.
            after = slice(start + 1, start + count + 1)
            known = len(tokens[after])
            targets[at : at + known] = tokens[after]
            weights[at : at + known] = learned[after]
            at += count
        return Batch(ids, targets, positions, segments, weights)


def split(
    count: int, share: float, *, seed: int
) -> tuple[Integer[np.ndarray, " trained"], Integer[np.ndarray, " held_out"]]:
    """Split range(count) at random into indices of training examples and of held-out examples.

    share: the part of all examples that is held out.

    Both results are in ascending order. Raises ValueError if a share other than 0 leaves either
    side empty.
    """
    out = round(share * count)
    if share and not 0 < out < count:
        raise ValueError(f"{share:g} of {count} examples leaves nothing on one side")
    held_out = np.zeros(count, bool)
    if out:
        shuffled = np.arange(count, dtype=np.uint32)
        np.random.default_rng(seed).shuffle(shuffled)
        held_out[shuffled[:out]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _checksum(examples: Numbers | None, count: int) -> int:
    """Return the CRC-32 of the sorted indices of the examples, as int64.

    examples: the indices; None stands for all `count` examples.
    """
    found = None if examples is None else np.sort(examples)
    checksum = 0
    for at in range(0, count if found is None else len(found), _AT_A_TIME):
        end = min(at + _AT_A_TIME, count)
        part = np.arange(at, end) if found is None else found[at : at + _AT_A_TIME]
        checksum = zlib.crc32(part.astype("<i8").data, checksum)
    return checksum
