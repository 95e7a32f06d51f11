"""Records out of files of every kind, and files that cannot be read."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qwen_jax.runtime import records
from tests.support.vocabulary import qwen_tokenizer

VALUES = [{"text": "one"}, {"text": "zwölf\nlines"}, {"text": "三"}]
LINES = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in VALUES)


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(VALUES), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(VALUES))
    else:
        data = LINES.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_every_kind_has_the_same_records(tmp_path, name):
    path = written(tmp_path, name)
    found = list(records.read(path))
    assert [record.value for record in found] == VALUES
    assert all(record.ends and not record.problem for record in found)
    assert found[1].where.startswith(f"{path} ") and found[1].where.endswith(" 2")
    assert found[-1].position <= path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_parts_have_each_record_once(tmp_path, monkeypatch, name):
    """However many there are, wherever they are cut: in a line, at its end, in an empty one."""
    path = tmp_path / name
    values = [{"text": "x" * (i % 5)} for i in range(12)]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=2)
    else:
        path.write_text(
            "".join(json.dumps(value) + "\n" * (1 + i % 3) for i, value in enumerate(values))
        )
    whole = list(records.read(path))
    size = path.stat().st_size
    for bytes_of_part in range(1, size + 2, 1 if size < 400 else 97):
        monkeypatch.setattr(records, "_PART", bytes_of_part)
        parts = records.parts([path])
        assert len(parts) == -(-size // bytes_of_part)
        found = [
            (records.place(part, record.where, line=record.line), record.value)
            for part in parts
            for record in records.read(part.path, part.number, count=part.count)
        ]
        assert found == [(record.where, record.value) for record in whole]
    (path.parent / "b.json").write_text("[1]")
    assert len(records.parts([path.parent / "b.json"])) == 1


def test_a_line_that_is_no_json_is_handed_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \n\xff\n{"text": "b"}\n')
    found = list(records.read(path))
    assert [record.value for record in found] == [{"text": "a"}, None, None, {"text": "b"}]
    assert [bool(record.problem) for record in found] == [False, True, True, False]
    assert found[1].where == f"{path} line 3" and found[1].problem.startswith("no JSON: ")


def test_a_long_text_comes_in_pieces_that_encode_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 50)
    text = "".join(f"line {i}  \n\n  indented\u3000{i}\r\n\u3000wide\n!?\n" for i in range(40))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = list(records.read(path))
    assert len(found) > 10 and "".join(record.value for record in found) == text
    assert [record.ends for record in found] == [False] * (len(found) - 1) + [True]
    tokenizer = qwen_tokenizer()
    pieces = [i for record in found for i in tokenizer.encode(record.value)]
    assert pieces == tokenizer.encode(text)


def test_files_of_a_folder_in_order(tmp_path):
    for name in ("b.jsonl", "a.txt", "notes.md"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "c.jsonl").mkdir()
    assert [path.name for path in records.files([tmp_path])] == ["a.txt", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.jsonl", None, "none.jsonl does not exist"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("a.csv", b"a,b", "a.csv: data files end in .jsonl, "),
        ("folder", None, "folder holds no file that ends in .jsonl"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, problem):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        records.files([path])


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b"[1,\n2", " line 2: no JSON"),
        ("a.json", b'{"a": 1}', ": it holds no list; for an object on each line"),
        ("a.json", b"\xff", ": no UTF-8 at byte 0"),
        ("a.json", DEEP, ": no JSON: maximum recursion"),
        ("a.jsonl", DEEP, " line 1: no JSON: maximum recursion"),
        ("a.txt", b"good\n\xff\nmore\n", " line 2: no UTF-8"),
        ("a.jsonl.gz", b"plain", ": Not a gzipped file"),
        ("a.parquet", b"PAR1plain", ": Parquet magic bytes not found"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_bad_record(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    (record,) = (record for file in records.files([path]) for record in records.read(file))
    assert record.value is None and record.ends
    assert f"{record.where}: {record.problem}".startswith(f"{path}{problem}")
    assert "\n" not in record.problem


def numbered(path: Path) -> int:
    """Write records that do not compress to nothing; how many."""
    values = [{"text": random.Random(i).randbytes(200).hex()} for i in range(3000)]
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(values)
        pyarrow.parquet.write_table(table, path, row_group_size=500)
    else:
        lines = "".join(json.dumps(value) + "\n" for value in values)
        path.write_bytes(gzip.compress(lines.encode()))
    return len(values)


@pytest.mark.parametrize(
    ("name", "cut"), [("a.jsonl.gz", True), ("a.jsonl.gz", False), ("a.parquet", False)]
)
def test_what_breaks_in_the_middle_is_good_up_to_there(tmp_path, name, cut):
    path = tmp_path / name
    count = numbered(path)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half:] = b"" if cut else b"\xff" * 5000 + data[half + 5000 :]
    path.write_bytes(data)
    *found, last = records.read(path)
    good = [record for record in found if not record.problem]
    assert 0 < len(good) < count and good == found[: len(good)]
    assert len(found) == len(good) or not cut  # what is no gzip may look so for a while
    assert last.where == str(path) and last.problem and last.value is None
    assert 0 < last.position <= len(data)


def test_a_text_that_breaks_off_ends_with_the_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 50)
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of text\n" * 20 + b"\xff\n" + b"more\n")
    *pieces, last = records.read(path)
    assert pieces and not any(record.ends or record.problem for record in pieces)
    assert last.ends and last.problem == "no UTF-8" and last.where == f"{path} line 21"
