"""Reads records one by one from files: JSONL, JSON, Parquet and plain text, local or remote.

A record that cannot be read is yielded with its problem, and the caller decides whether to go on
without it. Knows nothing of what records mean.
"""

import dataclasses
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from qwen_jax.runtime import paths, texts

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".txt", ".txt.gz")
_PIECE = 2**20  # characters of a piece of a long text
_PART = 2**26  # bytes of a part of a file


@dataclasses.dataclass(frozen=True)
class Record:
    """A record of a data file, or a piece of a long text file.

    where: the file, and the line or record in it, for messages.
    value: the parsed value; a string if the file is text; None if the record cannot be read.
    problem: why the record cannot be read, else "".
    ends: whether this piece ends its document. A problem in one piece makes the whole document bad.
    position: the bytes read so far of the file, or of the part of it that is read.
    line: the line within that part, if `where` does not name one; else 0.
    """

    where: str
    value: object
    problem: str = ""
    ends: bool = True
    position: int = 0
    line: int = 0


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A part of a data file that can be read without the others.

    path: the file.
    number: the index of the part, from 0.
    count: the number of the file's parts.
    size: the approximate number of bytes in the part.
    """

    path: Path
    _: dataclasses.KW_ONLY
    number: int = 0
    count: int = 1
    size: int = 0


def parts(paths_of: Sequence[Path]) -> list[FilePart]:
    """Split data files into parts of about 64 MiB, where they can be read from the middle.

    JSONL is split by lines and Parquet by row groups; other files are one part each. The split
    depends on the files alone.
    """
    found = []
    for path in paths_of:
        size = paths.size(path)
        count = max(1, -(-size // _PART)) if _suffix(path) in (".jsonl", ".parquet") else 1
        each = size // count
        found += [FilePart(path, number=i, count=count, size=each) for i in range(count)]
    return found


def place(part: FilePart, where: str, *, line: int) -> str:
    """Return where a record is, for messages.

    part, where, line: the part of a file that has the record, and the record's `where` and `line`.
    A `line` other than 0 is converted to the line number in the whole file, and appended to
    `where`.
    """
    return f"{where} line {line + _lines_before(part)}" if line else where


def _lines_before(part: FilePart) -> int:
    """Count the lines of a file that begin before the given part."""
    found = 0
    with paths.open_binary(part.path) as file:
        left = _seek_part(part.path, file, number=part.number, count=part.count)
        file.seek(0)
        while left and (block := file.read(min(left, 2**20))):
            found += block.count(b"\n")
            left -= len(block)
    return found


def _seek_part(path: Path, file: IO[bytes], *, number: int, count: int) -> int:
    """Seek to the first line that begins in part `number` of a file of lines; return its offset."""
    begin = paths.size(path) * number // count
    if begin:
        file.seek(begin - 1)
        file.readline()  # a line that begins before this part is in the part before
    return file.tell()


def files(sources: Sequence["str | os.PathLike[str]"]) -> list[Path]:
    """List the data files that `sources` name; a folder stands for all data files in it, by name.

    Raises ValueError for a file that is missing, empty or of an unknown kind.
    """
    if isinstance(sources, str | bytes):
        raise ValueError(f"sources must be a list of paths, got {texts.described(sources)}")
    found: list[Path] = []
    for source in sources:
        path = paths.parse(source)
        inside = [path]
        if path.is_dir():
            known = sorted(p for p in path.iterdir() if _suffix(p))
            inside = [p for p in known if paths.is_remote(p) or not p.is_dir()]
        if not inside:
            raise ValueError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
        found += inside
    for path in found:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not _suffix(path):
            raise ValueError(f"{path}: data files end in {', '.join(SUFFIXES)}")
        if paths.size(path) == 0:
            raise ValueError(f"{path} is empty")
    return found


def read(path: Path, number: int = 0, *, count: int = 1) -> Iterator[Record]:
    """Yield the records of one data file, or of part `number` of its `count` parts.

    If the rest of the file cannot be read, the last record says why in `problem`.
    """
    suffix = _suffix(path)
    assert suffix
    with paths.open_binary(path) as raw:
        file = gzip.GzipFile(fileobj=raw) if suffix.endswith(".gz") else raw
        kind = suffix.removesuffix(".gz")
        readers = {".jsonl": _lines, ".json": _list, ".parquet": _parquet, ".txt": _text}
        try:
            begin = paths.size(path) * number // count
            for record in readers[kind](path, file, number, count):
                yield dataclasses.replace(record, position=max(0, raw.tell() - begin))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield Record(str(path), None, str(error), position=raw.tell())


def _suffix(path: Path) -> str | None:
    """Return the longest of `SUFFIXES` in which a path ends; None if there is none."""
    fitting = [suffix for suffix in SUFFIXES if path.name.endswith(suffix)]
    return max(fitting, key=len, default=None)


def _lines(path: Path, file: IO[bytes], part: int, count: int) -> Iterator[Record]:
    """Yield the records of JSONL, or of one part of it: an object in each line."""
    at, end = 0, math.inf
    if count > 1:
        if part and texts.foreign(file.readline()):
            return  # the first part reports this problem of the file
        at = _seek_part(path, file, number=part, count=count)
        end = paths.size(path) * (part + 1) // count
    for number, line in enumerate(file, 1):
        if at >= end:
            return
        at += len(line)
        # Only the first part knows its lines' numbers in the whole file.
        where, line_in_part = (str(path), number) if part else (f"{path} line {number}", 0)
        if number == 1 and not part:
            if problem := texts.foreign(line):
                yield Record(where, None, problem)
                return
            line = texts.unmarked(line)
        if not line.strip():
            continue
        try:
            yield Record(where, json.loads(line.rstrip()), line=line_in_part)
        except json.JSONDecodeError as error:
            problem = f"no JSON: {error.msg} at character {error.pos + 1}"
            yield Record(where, None, problem, line=line_in_part)
        except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deeply
            yield Record(where, None, f"no JSON: {error}", line=line_in_part)


def _list(path: Path, file: IO[bytes], *_: int) -> Iterator[Record]:
    """Yield the records of a JSON file: the values of its list."""
    data = file.read()
    if problem := texts.foreign(data):
        yield Record(str(path), None, problem)
        return
    try:
        values = json.loads(data)
    except json.JSONDecodeError as error:
        yield Record(f"{path} line {error.lineno}", None, f"no JSON: {error.msg}")
        return
    except UnicodeDecodeError as error:
        yield Record(str(path), None, f"no UTF-8 at byte {error.start}")
        return
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        yield Record(str(path), None, f"no JSON: {error}")
        return
    if not isinstance(values, list):
        problem = "it holds no list; for an object on each line, name it .jsonl"
        yield Record(str(path), None, problem)
        return
    for number, value in enumerate(values, 1):
        yield Record(f"{path} record {number}", value)


def _parquet(path: Path, file: IO[bytes], part: int, count: int) -> Iterator[Record]:
    """Yield the rows of a Parquet file, or of one part of it, as objects."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        first, end = (table.num_row_groups * x // count for x in (part, part + 1))
        number = sum(table.metadata.row_group(group).num_rows for group in range(first))
        for batch in table.iter_batches(batch_size=256, row_groups=range(first, end)):
            for value in batch.to_pylist():
                number += 1
                yield Record(f"{path} row {number}", value)
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # an error of the disk, not of the format
        yield Record(str(path), None, " ".join(str(error).split()))


def _text(path: Path, file: IO[bytes], *_: int) -> Iterator[Record]:
    """Yield a text file, which is one document; a long document comes in pieces.

    Pieces begin at lines that do not begin with white space, which no token can cross, so that they
    together encode as the whole document does.
    """
    held: list[str] = []
    first, size = 1, 0
    for number, line in enumerate(file, 1):
        where, problem = f"{path} line {number}", texts.foreign(line) if number == 1 else None
        try:
            text = (texts.unmarked(line) if number == 1 else line).decode()
        except UnicodeDecodeError:
            text, problem = "", problem or "no UTF-8"
        if "\0" in text:
            problem = "a zero byte: it is no text, or in another encoding"
        if problem:
            yield Record(where, None, problem)
            return
        if size >= _PIECE and not text[0].isspace():
            yield Record(f"{path} line {first}", "".join(held), ends=False)
            held, first, size = [], number, 0
        held.append(text)
        size += len(text)
    yield Record(f"{path} line {first}", "".join(held))
