"""Which examples share a row, and rows as what a step trains on. Arithmetic on lengths; no files.

A row is the same whatever the mesh and the number of processes: it depends on examples, length and
seed alone.
"""

import dataclasses
import zlib

import numpy as np

from train.loss import Batch
from train.token_cache import TokenCache

_OPEN = 256  # rows that an example may still join


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Of rows, one after the other: the examples in each, and which part of them.

    example, start, length [pieces]; first [rows + 1]: where each row's pieces begin.
    """

    example: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray


def joined(lengths: np.ndarray, row: int) -> Pieces:
    """All examples one behind the other, cut every `row` tokens; what is left over is dropped,
    unless it is all there is.
    """
    ends = np.cumsum(lengths)
    rows = max(1, int(ends[-1]) // row)
    total = min(int(ends[-1]), rows * row)
    # Pieces begin where an example or a row does.
    begins = np.union1d(ends - lengths, np.arange(rows) * row)
    begins = begins[begins < total]
    example = np.searchsorted(ends, begins, side="right")
    return Pieces(
        example=example,
        start=begins - (ends - lengths)[example],
        length=np.diff(begins, append=total),
        first=np.append(np.searchsorted(begins, np.arange(rows) * row), len(begins)),
    )


def fitted(lengths: np.ndarray, row: int) -> Pieces:
    """Whole examples, none longer than `row`, in the fullest of the open rows that has room."""
    space = np.full(_OPEN, row)
    members: list[list[int]] = [[] for _ in range(_OPEN)]
    closed: list[list[int]] = []
    for i, length in enumerate(lengths):
        room = np.where(space >= length, space, row + 1)
        at = int(np.argmin(room))
        if room[at] > row:
            at = int(np.argmin(space))
            closed.append(members[at])
            members[at], space[at] = [], row
        members[at].append(i)
        space[at] -= length
    closed += [examples for examples in members if examples]
    return _whole(closed, lengths)


def alone(lengths: np.ndarray) -> Pieces:
    """An example a row."""
    return _whole([[i] for i in range(len(lengths))], lengths)


def _whole(rows: list[list[int]], lengths: np.ndarray) -> Pieces:
    example = np.array([i for row in rows for i in row], np.int64)
    first = np.cumsum([0, *map(len, rows)])
    return Pieces(example, np.zeros_like(example), lengths[example], first)


class Rows:
    """Rows by number, each a Batch of [length] arrays: `rows[i]`.

    pack: "joined" documents, "fitted" examples, or "alone". examples: the numbers of those to take,
    None for all; they are shuffled by `seed` before they are packed.
    """

    def __init__(
        self,
        cache: TokenCache,
        length: int,
        pack: str,
        seed: int = 0,
        examples: np.ndarray | None = None,
    ):
        examples = np.arange(len(cache)) if examples is None else examples
        self._order = np.random.default_rng(seed).permutation(examples)
        lengths = cache.lengths[self._order]
        if pack != "joined" and lengths.max() > length:
            raise ValueError(f"an example has {lengths.max()} tokens, a row {length}")
        make = {"joined": joined, "fitted": fitted, "alone": lambda lengths, _: alone(lengths)}
        self._cache, self._length = cache, length
        self._pieces = make[pack](lengths, length)

    def __len__(self) -> int:
        return len(self._pieces.first) - 1

    @property
    def fingerprint(self) -> str:
        """Says which examples are in these rows; the recipe says the rest."""
        return f"{self._cache.counts.digest[:32]}-{zlib.crc32(np.sort(self._order).tobytes()):08x}"

    @property
    def efficiency(self) -> float:
        """The share of all places that hold a token."""
        return float(self._pieces.length.sum()) / (len(self) * self._length)

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
            # Of a piece that goes on in the next row, the last token has its target there.
            after = slice(start + 1, start + count + 1)
            known = len(tokens[after])
            targets[at : at + known] = tokens[after]
            weights[at : at + known] = learned[after]
            at += count
        return Batch(ids, targets, positions, segments, weights)
