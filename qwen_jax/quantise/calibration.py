"""Calibration data: reads conversations and texts, and packs them into rows of token ids."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from qwen_jax import checkpoint
from qwen_jax.chat import examples
from qwen_jax.chat.prompt import DEFAULT_SYSTEM
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.runtime import command, processes, records

# What is taken where nothing is asked for: rows, rows that are held out, and tokens of a row.
SAMPLES, HELD_OUT, LENGTH = 128, 16, 2048
_CHOICE = 8  # rows are chosen among so many times as many as are wanted


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens on which a model is measured.

    tokens: int32 [rows, T], the token ids.
    positions: int32 [rows, T], the position of each token in its text, from 0.
    segments: int32 [rows, T], the number of each token's text in its row, from 1; 0 is padding.
    """

    tokens: Int32[np.ndarray, "rows T"]
    positions: Int32[np.ndarray, "rows T"]
    segments: Int32[np.ndarray, "rows T"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """The number of tokens of a row, padding included."""
        return self.tokens.shape[1]

    @property
    def counted(self) -> int:
        """The number of tokens without padding."""
        return int(np.count_nonzero(self.segments))

    def part(self, rows: slice | np.ndarray) -> "Rows":
        """Return some of the rows."""
        return Rows(self.tokens[rows], self.positions[rows], self.segments[rows])

    def digest(self) -> str:
        """Return a number that identifies these rows."""
        found = hashlib.sha256(repr(self.tokens.shape).encode())
        for array in (self.tokens, self.positions, self.segments):
            found.update(array.tobytes())
        return found.hexdigest()[:16]


def of_tokens(tokens: Int32[np.ndarray, "rows T"]) -> Rows:
    """Return rows that are filled by one text each."""
    tokens = np.asarray(tokens, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Rows(tokens, positions, np.ones_like(tokens))


def of_model(
    ckpt: Path,
    sources: Sequence[str | Path],
    *,
    length: int | None = None,
    samples: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    field: str = "text",
) -> tuple[Rows, Rows | None]:
    """Read the rows to calibrate a model on, and those that are held out, or None for none.

    ckpt: the directory of the model, with its tokenizer.
    sources, seed, field: as in `read`.
    length: the number of tokens of a row; None for `LENGTH`, or the model's `seq_length` if less.
    samples: the number of rows to calibrate on; None for what there is, `SAMPLES` at most.
    held_out: the number of the others; None for an eighth of what there is, `HELD_OUT` at most.

    Says in a line on stderr what was found. The errors are those of `read`; all processes must read
    the same rows.
    """
    config, tokenizer = checkpoint.load_config(ckpt), checkpoint.load_tokenizer(ckpt)
    if tokenizer is None:
        raise ValueError(f"{ckpt} has no tokenizer: put its qwen.tiktoken there")
    length = length or min(LENGTH, config.seq_length)
    rows = read(
        sources,
        tokenizer,
        length=length,
        least=(samples or 1) + (held_out or 0),
        most=(samples or SAMPLES) + (HELD_OUT if held_out is None else held_out),
        seed=seed,
        field=field,
    )
    processes.agree("calibration data", f"{len(rows)} rows of digest {rows.digest()}")
    if held_out is None:
        held_out = len(rows) - samples if samples else min(HELD_OUT, len(rows) // 8)
    count = len(rows) - held_out
    found, others = rows.part(slice(count)), rows.part(slice(count, None))
    command.say(
        f"calibrating on {count} rows of {length} tokens ({found.counted:,} without padding); "
        + (f"comparing on {held_out} others" if held_out else "comparing on the same")
    )
    if found.counted < (widest := max(config.sizes["D"], config.sizes["F"])):
        command.say(
            f"note: {found.counted:,} tokens are fewer than the {widest:,} inputs of a matrix: "
            "more data would make errors on other texts smaller"
        )
    return found, others if held_out else None


def read(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    length: int,
    least: int,
    most: int,
    seed: int,
    field: str = "text",
) -> Rows:
    """Read calibration data, and return rows of it, chosen at random and in random order.

    sources: files or folders of conversations, as training takes them, or of texts.
    length: the number of tokens of a row. What is longer is cut: of a conversation the end is left
        out, a text goes on in the next row.
    least, most: the number of rows that are needed, and of those that are returned if there are
        more.
    field: the field of a record that holds its text; one without it is a conversation.

    Raises ValueError for a record that cannot be read, for a conversation without a reply, and for
    too little data.
    """
    packed = _packed(_pieces(sources, tokenizer, length=length, field=field), length=length)
    found = list(itertools.islice(packed, _CHOICE * most))
    tokens = sum(len(piece) for row in found for piece in row)
    if tokens < length or len(found) < least:
        raise ValueError(
            f"the calibration data has {tokens:,} tokens, which are {len(found)} rows of {length}, "
            f"and {least} full ones are needed: give more data, or `python -m qwen_jax.quantise` a "
            "smaller --length, --samples or --held-out"
        )
    order = np.random.default_rng(seed).permutation(len(found))[:most]
    return _filled([found[number] for number in order], length)


def _pieces(
    sources: Sequence[str | Path], tokenizer: Tokenizer, *, length: int, field: str
) -> Iterator[list[int]]:
    """Yield the ids of each conversation and of each part of a text, at most `length` of them."""
    document: list[int] = []
    for record in (record for file in records.files(sources) for record in records.read(file)):
        if record.problem:
            raise ValueError(f"{record.where}: {record.problem}")
        try:
            if _is_chat(record.value, field):
                yield examples.chat_example(
                    tokenizer, record.value, system=DEFAULT_SYSTEM, max_len=length
                )[0]
                continue
            document += examples.text_example(
                tokenizer, record.value, field=field, ends=record.ends
            )
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        while len(document) >= length or (record.ends and document):
            yield document[:length]
            document = document[length:]


def _is_chat(value: object, field: str) -> bool:
    """Return whether a record is a conversation, and not an object with a text in `field`."""
    return isinstance(value, Mapping) and field not in value


def _packed(pieces: Iterator[list[int]], *, length: int) -> Iterator[list[list[int]]]:
    """Yield the pieces of each row: as many, one after the other, as it has room for."""
    row: list[list[int]] = []
    for piece in pieces:
        if row and sum(map(len, row)) + len(piece) > length:
            yield row
            row = []
        row.append(piece)
    if row:
        yield row


def _filled(rows: Sequence[Sequence[Sequence[int]]], length: int) -> Rows:
    """Return rows as arrays, from the pieces of each."""
    tokens, positions, segments = np.zeros((3, len(rows), length), np.int32)
    for number, row in enumerate(rows):
        at = 0
        for segment, piece in enumerate(row, 1):
            part = number, slice(at, at + len(piece))
            tokens[part], positions[part], segments[part] = piece, np.arange(len(piece)), segment
            at += len(piece)
    return Rows(tokens, positions, segments)
