"""The token cache, and rows made of it: what is in them, and that packing changes no loss."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qwen_jax import meshes
from qwen_jax.attention import xla
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.leaves.weights import named_leaves
from qwen_jax.runtime import lock, records
from tests.support import launch
from tests.support.tiny import QUICK, on_mesh, tiny_config, tiny_decoder
from tests.support.vocabulary import qwen_tokenizer, tiny_ranks
from train import data
from train.data import batches, packing, shared_cache, token_cache, token_files
from train.data.batch import IGNORED, Batch
from train.data.packing import Rows
from train.data.token_cache import Encoding, TokenCache
from train.step import loss as losses

VOCABULARY = tiny_config().vocab_size


def encode(record: records.Record) -> Any:
    """Of a record {"ids", "labels"}: those."""
    if "ids" not in record.value:
        raise ValueError("it has no ids")
    return record.value["ids"], record.value.get("labels")


PLAIN = Encoding(encode, {"data": "ids"})


def cached(folder: Path, values: list[Any], encoding: Encoding = PLAIN) -> TokenCache:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return token_cache.make([file], qwen_tokenizer(), encoding=encoding, home=folder / "cache")


def make_again(folder: Path, **changes: Any) -> TokenCache:
    encoding = dataclasses.replace(PLAIN, **changes)
    file = folder / "data.jsonl"
    return token_cache.make([file], qwen_tokenizer(), encoding=encoding, home=folder / "cache")


def examples(count: int, most: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Some with labels that are ignored."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(0, VOCABULARY, rng.integers(2, most + 1))
        labels = np.where(rng.random(len(ids)) < 0.3, IGNORED, ids)
        labels[-1] = ids[-1]
        found.append({"ids": ids.tolist(), "labels": labels.tolist()})
    return found


def test_a_cache_holds_what_was_encoded(tmp_path):
    values = examples(500, 20)
    cache = cached(tmp_path, values)
    assert len(cache) == 500 and cache.counts.examples == cache.counts.records == 500
    for i, value in enumerate(values):
        ids, learned = cache[i]
        assert ids.tolist() == value["ids"]
        assert learned.tolist() == [label != IGNORED for label in value["labels"]]
    assert cache.counts.tokens == sum(len(value["ids"]) for value in values)


def test_a_second_run_encodes_nothing(tmp_path):
    calls = []

    def counted(record: records.Record) -> Any:
        calls.append(record)
        return encode(record)

    encoding = dataclasses.replace(PLAIN, encode=counted)
    first = cached(tmp_path, examples(10, 5), encoding)
    assert len(calls) == 10
    file = tmp_path / "data.jsonl"
    again = lambda **x: token_cache.make(  # noqa: E731
        [file],
        qwen_tokenizer(),
        encoding=dataclasses.replace(encoding, **x),
        home=tmp_path / "cache",
    )
    assert again().folder == first.folder and len(calls) == 10
    # Whatever it depends on makes another.
    assert again(longest=4).folder != first.folder and len(calls) == 20
    assert again(name={"data": "other"}).folder != first.folder and len(calls) == 30
    file.write_text(file.read_text() + '{"ids": [1, 2]}\n')
    assert len(again()) == 11


def test_what_is_cut_short_is_no_cache(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache.paths, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path, examples(10, 5))
    assert not folders(tmp_path)
    assert len(cached(tmp_path, examples(10, 5))) == 10


@pytest.mark.parametrize("file", ["ids.u4", "ends.i8", "trained.b1", "counts.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path, file, how):
    values = [{"ids": list(range(5)), "labels": [-100, 1, 2, 3, 4]}] * 10
    path = cached(tmp_path, values).folder / file
    before = path.read_bytes()
    path.write_bytes(before[:-4]) if how == "cut" else path.unlink()
    cache = make_again(tmp_path)
    assert len(cache) == 10 and (cache.folder / file).read_bytes() == before


def folders(home: Path) -> list[Path]:
    return [path for path in (home / "cache").glob("*") if path.is_dir()]


def test_another_host_may_be_quicker(tmp_path, monkeypatch):
    """Where the lock does not hold: its cache is used, and nothing else is left."""
    values = examples(10, 5)
    fill = token_cache._fill

    def slow(*arguments: Any, **named: Any) -> None:
        fill(*arguments, **named)
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "_fill", fill)
            patch.setattr(lock.fcntl, "flock", lambda *_, **__: None)
            patch.setattr(token_cache.socket, "gethostname", lambda: "other")
            others.append(make_again(tmp_path))

    others: list[TokenCache] = []
    monkeypatch.setattr(token_cache, "_fill", slow)
    cache = cached(tmp_path, values)
    assert folders(tmp_path) == [cache.folder] == [others[0].folder]
    assert len(cache) == 10


def test_drafts_of_killed_processes_go(tmp_path):
    folder = cached(tmp_path, examples(10, 5)).folder
    host = token_cache.socket.gethostname()
    own, other = (folder.with_name(f"{folder.name}.1@{name}.tmp") for name in (host, "other"))
    part = folder.with_name(f"{folder.name}.parts-3.1@{host}.tmp")  # of a program that lives
    folder.rename(own)
    other.mkdir()
    part.mkdir()
    make_again(tmp_path)
    assert sorted(folders(tmp_path)) == sorted([folder, other, part])


def test_a_draft_of_a_part_may_be_of_a_killed_process_with_our_number(tmp_path):
    """As in a container that starts again, where processes get the same numbers."""
    left = tmp_path / f"part.{os.getpid()}@{token_cache.socket.gethostname()}.tmp"
    left.mkdir()
    (left / "ids.u4").touch()
    with shared_cache._draft(tmp_path, "part") as draft:
        assert draft.is_dir() and not list(draft.iterdir())
    assert not list(tmp_path.iterdir())


def test_bad_records_are_counted_and_named(tmp_path):
    values = [
        {"ids": [1, 2]},
        {"text": "x"},
        {"ids": [3] * 9},
        {"ids": [1] * 9, "labels": [-100] * 8 + [1]},
    ]
    cut = cached(tmp_path, values, dataclasses.replace(PLAIN, longest=4))
    assert dataclasses.replace(cut.counts, problems=(), digest="") == token_cache.Counts(
        records=4, examples=2, tokens=6, trained=6, cut=2, bad=2
    )
    file = tmp_path / "data.jsonl"
    assert list(cut.counts.problems) == [
        f"{file} line 2: it has no ids",
        f"{file} line 4: nothing to learn in the first 4 tokens",
    ]
    drop = cached(tmp_path, values, dataclasses.replace(PLAIN, longest=4, drop=True))
    assert (drop.counts.dropped, drop.counts.examples) == (2, 1)
    with pytest.raises(ValueError, match=r"data.jsonl line 2: it has no ids$"):
        cached(tmp_path, values, dataclasses.replace(PLAIN, strict=True))
    with pytest.raises(
        ValueError, match=r"no example in .*data.jsonl; the first: .* line 1: it has"
    ):
        cached(tmp_path, [{"text": "x"}])


def test_strict_holds_for_a_cache_that_is_there(tmp_path):
    cached(tmp_path, [{"ids": [1, 2]}, {"text": "x"}])
    with pytest.raises(ValueError, match=r"data.jsonl line 2: it has no ids$"):
        make_again(tmp_path, strict=True)


LINE = "one line of it, and so on.\n"


def texts(folder: Path, contents: list[bytes], **options: Any) -> TokenCache:
    """A cache of files of text, in pieces of a few lines."""
    for i, content in enumerate(contents):
        (folder / f"{i}.txt").write_bytes(content)

    def encode(record: records.Record) -> Any:
        return data.text_example(qwen_tokenizer(), record.value, ends=record.ends), None

    files = [folder / f"{i}.txt" for i in range(len(contents))]
    encoding = Encoding(encode, {"data": "text"}, **options)
    return token_cache.make(files, qwen_tokenizer(), encoding=encoding, home=folder / "cache")


def test_limits_are_of_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 60)
    long, short = (LINE * 20).encode(), b"short"
    end = [qwen_tokenizer().eod_id]
    all_ids = [qwen_tokenizer().encode(text.decode()) + end for text in (long, short)]
    whole = texts(tmp_path, [long, short])
    assert [whole[i][0].tolist() for i in range(len(whole))] == all_ids
    cut = texts(tmp_path, [long, short], longest=30)
    assert [cut[i][0].tolist() for i in range(len(cut))] == [all_ids[0][:30], all_ids[1]]
    assert (cut.counts.records, cut.counts.examples, cut.counts.cut) == (2, 2, 1)
    drop = texts(tmp_path, [long, short], longest=30, drop=True)
    assert [drop[i][0].tolist() for i in range(len(drop))] == all_ids[1:]
    assert (drop.counts.records, drop.counts.examples, drop.counts.dropped) == (2, 1, 1)


def test_a_bad_piece_makes_the_document_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 60)
    broken = (LINE * 10).encode() + b"\xff\n" + (LINE * 10).encode()
    cache = texts(tmp_path, [b"a", broken, b"b"])
    end = [qwen_tokenizer().eod_id]
    assert [cache[i][0].tolist() for i in range(len(cache))] == [
        qwen_tokenizer().encode(text) + end for text in "ab"
    ]
    assert (cache.counts.records, cache.counts.bad) == (3, 1)
    assert list(cache.counts.problems) == [f"{tmp_path / '1.txt'} line 11: no UTF-8"]
    with pytest.raises(ValueError, match=r"1.txt line 11: no UTF-8$"):
        texts(tmp_path, [b"a", broken, b"b"], strict=True)
    with pytest.raises(ValueError, match=r"no example in .*0.txt; the first: .*0.txt line 11: no"):
        texts(tmp_path, [broken])


def hashed(examples: list[tuple[list[int], list[bool]]]) -> str:
    """The digest of examples, by its definition."""
    digest = hashlib.sha256()
    for ids, learned in examples:
        digest.update(b"%d " % len(ids))
        digest.update(np.array(ids, "<u4").tobytes() + np.array(learned, "?").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("held", [1, 40, 2**22])
def test_long_documents_are_written_in_pieces(tmp_path, monkeypatch, held):
    """And what is left out in the end leaves nothing behind."""
    monkeypatch.setattr(records, "_PIECE", 60)
    monkeypatch.setattr(token_files, "_HELD", held)
    long, broken = (LINE * 20).encode(), (LINE * 10).encode() + b"\xff\n" + LINE.encode()
    cache = texts(tmp_path, [long, broken, b"short", long])
    end = [qwen_tokenizer().eod_id]
    ids = [qwen_tokenizer().encode(text) + end for text in (LINE * 20, "short", LINE * 20)]
    assert [cache[i][0].tolist() for i in range(len(cache))] == ids
    assert cache.counts.digest == hashed([(x, [True] * len(x)) for x in ids])
    assert cache.counts.tokens == len(cache.ids) and cache.counts.bad == 1


def test_problems_are_not_collected_without_end(tmp_path):
    cache = cached(tmp_path, [{"ids": [1, 2]}, *({"text": "x"} for _ in range(50))])
    assert cache.counts.bad == 50 and len(cache.counts.problems) == 10
    parts = records.parts([tmp_path / "data.jsonl"])
    (tmp_path / "part").mkdir()
    with token_cache.progress(parts) as bar:
        _, problems = token_cache.encode(tmp_path / "part", parts, encoding=PLAIN, bar=bar)
    assert len(problems) == 10


# Several processes


class Group:
    """`processes` for threads that stand for processes. homes: of each the folder of its caches;
    those of equal name are on one host.
    """

    def __init__(self, homes: list[Path]):
        self.homes, self._local = homes, threading.local()
        self._barrier, self._values = threading.Barrier(len(homes)), [""] * len(homes)

    def index(self) -> int:
        return self._local.index

    def count(self) -> int:
        return len(self.homes)

    def count_here(self) -> int:
        return self.homes.count(self.homes[self.index()])

    def barrier(self) -> None:
        self._barrier.wait(launch.LONG)

    def gather(self, value: str) -> list[str]:
        self._values[self.index()] = value
        self.barrier()
        found = list(self._values)
        self.barrier()
        return found

    def run(self, work: Any) -> list[Any]:
        """What `work(home)` returns in each process, or raises."""
        results: list[Any] = [None] * self.count()

        def one(index: int) -> None:
            self._local.index = index
            try:
                results[index] = work(self.homes[index])
            except Exception as error:
                results[index] = error
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.count())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def of_all_kinds(folder: Path) -> list[Path]:
    """Files of every kind, some in several parts, with records that are cut and that are bad."""
    values = examples(60, 12)
    values[17] = {"text": "bad"}
    values[44] = {"text": "bad"}
    lines = "".join(
        json.dumps(value) + ("\n\n" if i % 7 else "\n") for i, value in enumerate(values)
    )
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.json").write_text(json.dumps(values[:10]))
    table = pyarrow.Table.from_pylist(values[:17])
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=4)
    return records.files([folder])


def bytes_of(cache: TokenCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


@pytest.mark.parametrize("hosts", [[0, 0], [0, 1], [0, 0, 1, 1, 2]])
def test_processes_share_the_encoding(tmp_path, monkeypatch, hosts):
    """Each record is encoded once, and the cache is the same to the byte as that of one process."""
    monkeypatch.setattr(records, "_PART", 700)
    (tmp_path / "data").mkdir()
    files = of_all_kinds(tmp_path / "data")
    calls: list[int] = []

    def counted(record: records.Record) -> Any:
        calls.append(1)
        return encode(record)

    encoding = dataclasses.replace(PLAIN, encode=counted, longest=10)
    alone = token_cache.make(files, qwen_tokenizer(), encoding=encoding, home=tmp_path / "alone")
    once = len(calls)
    calls.clear()
    homes = [tmp_path / f"host{host}" for host in hosts]
    group = Group(homes)
    shares: list[int] = []
    share = shared_cache.encode_share

    def record(store, parts, **x):
        shares.append(len([*range(x["share"], len(parts), x["shares"])]))
        share(store, parts, **x)

    for module in (shared_cache, token_cache):
        monkeypatch.setattr(module, "processes", group)
    monkeypatch.setattr(shared_cache, "encode_share", record)
    monkeypatch.setattr(shared_cache.command, "say", lambda line: said.append(line))
    said: list[str] = []
    common = tmp_path / "run" / "tokens"

    def made(home: Any) -> Any:
        given = {"encoding": encoding, "folder": home, "common": common}
        return shared_cache.make(files, qwen_tokenizer(), **given)

    caches = group.run(made)
    assert all(isinstance(cache, TokenCache) for cache in caches), caches
    assert all(bytes_of(cache) == bytes_of(alone) for cache in caches)
    assert len(calls) == once and not said
    assert len(shares) == len(hosts) and max(shares) - min(shares) <= 1 and min(shares) > 0
    one_disk = len(set(hosts)) == 1
    assert common.exists() != one_disk, "parts go to the run only where hosts share no other disk"
    left = {path.name for home in homes for path in home.iterdir()}
    assert left == {caches[0].folder.name}
    # A host that is new joins the parts that are there, and all others wait for nobody.
    calls.clear()
    if not one_disk:
        group.homes[-1] = tmp_path / "new"
        caches = group.run(made)
        assert bytes_of(caches[-1]) == bytes_of(alone) and not calls


def test_a_share_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_PART", 300)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in examples(40, 12)))
    parts, store = records.parts([file]), tmp_path / "store"
    put, calls = shared_cache._put, []

    def killed(*arguments: Any) -> None:
        if len(list(store.iterdir())) > 3:
            raise KeyboardInterrupt
        put(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shared_cache, "_put", killed)
        with pytest.raises(KeyboardInterrupt):
            shared_cache.encode_share(
                store, parts, encoding=PLAIN, share=0, shares=1, home=tmp_path
            )
    encoding = dataclasses.replace(PLAIN, encode=lambda x: calls.append(x) or encode(x))
    left = store / f"{store.name}-5.{2**22 + 1}@{shared_cache.socket.gethostname()}.tmp"
    left.mkdir()  # of a process that is no more
    shared_cache.encode_share(store, parts, encoding=encoding, share=0, shares=1, home=tmp_path)
    assert 0 < len(calls) < 40
    assert sorted(path.name for path in store.iterdir()) == sorted(map(str, range(len(parts))))
    (store / "2" / "ids.u4").write_bytes(b"")
    (tmp_path / "draft").mkdir()
    with pytest.raises(ValueError, match=f"{store / '2'} is damaged: remove {store}"):
        shared_cache.join(tmp_path / "draft", store, parts=parts)


def test_parts_that_another_program_is_at_stay(tmp_path, monkeypatch):
    """It waits, and then finds the cache."""
    monkeypatch.setattr(records, "_PART", 300)
    file, home = tmp_path / "a.jsonl", tmp_path / "home"
    file.write_text("".join(json.dumps(value) + "\n" for value in examples(40, 12)))
    group, calls, came = Group([home, home]), [], threading.Event()
    for module in (shared_cache, token_cache):
        monkeypatch.setattr(module, "processes", group)
    group._local.index = 0  # of this thread, which stands for the other program
    encoding = dataclasses.replace(PLAIN, encode=lambda x: calls.append(x) or encode(x))
    tokenizer = Tokenizer(tiny_ranks())
    name = token_cache.fingerprint([file], tokenizer, encoding=encoding)
    store = home / f"{name}.parts"

    def program() -> None:
        came.set()
        made.extend(
            group.run(
                lambda home: shared_cache.make(
                    [file], tokenizer, encoding=encoding, folder=home, common=tmp_path
                )
            )
        )

    made: list[Any] = []
    other = threading.Thread(target=program)
    with lock.alone(store, home / f"{store.name}.lock", wait=True):  # as another program has it
        other.start()
        came.wait()
        parts = records.parts([file])
        shared_cache.encode_share(store, parts, encoding=encoding, share=0, shares=1, home=home)
        assert len(calls) == 40 and not made
    other.join()
    assert len(calls) == 40, "parts that are there are taken"
    assert [cache.counts.examples for cache in made] == [40, 40]
    assert [path.name for path in home.iterdir()] == [name]


def test_hosts_with_other_files_encode_all_of_them(tmp_path, monkeypatch):
    """Copies of the same content under other dates are the same data, but nobody can know it."""
    group = Group([tmp_path / "a", tmp_path / "b"])
    for module in (shared_cache, token_cache):
        monkeypatch.setattr(module, "processes", group)
    said: list[str] = []
    monkeypatch.setattr(shared_cache.command, "say", said.append)

    def made(home: Path) -> TokenCache:
        home.mkdir()
        (home / "data.jsonl").write_text('{"ids": [1, 2]}\n')
        files = [home / "data.jsonl"]
        return shared_cache.make(
            files, qwen_tokenizer(), encoding=PLAIN, folder=home / "c", common=tmp_path / "run"
        )

    caches = group.run(made)
    assert [cache.counts.tokens for cache in caches] == [2, 2]
    assert set(said) == {
        "the hosts' data files differ in path or date: each host encodes all of them"
    }


def test_a_bad_record_of_a_share_ends_it_by_name(tmp_path, monkeypatch):
    """With its line in the file, whichever part it is in."""
    monkeypatch.setattr(records, "_PART", 200)
    file = tmp_path / "a.jsonl"
    values = examples(30, 8)
    values[21] = {"text": "bad"}
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    group = Group([tmp_path / "a", tmp_path / "b"])
    for module in (shared_cache, token_cache):
        monkeypatch.setattr(module, "processes", group)
    strict = dataclasses.replace(PLAIN, strict=True)
    results = group.run(
        lambda home: shared_cache.make(
            [file], qwen_tokenizer(), encoding=strict, folder=home, common=tmp_path / "run"
        )
    )
    errors = [str(result) for result in results if isinstance(result, ValueError)]
    assert errors == [f"{file} line 22: it has no ids"]


def placed(pieces: packing.Pieces) -> dict[int, list[tuple[int, int]]]:
    """(start, length) of the pieces of each example, in order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for example, start, length in zip(pieces.example, pieces.start, pieces.length, strict=True):
        found.setdefault(int(example), []).append((int(start), int(length)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_joined_documents_are_cut_into_full_rows(seed):
    lengths = np.random.default_rng(seed).integers(1, 40, 50)
    pieces = packing.joined(lengths, 16)
    rows = len(pieces.first) - 1
    assert rows == lengths.sum() // 16
    assert all(
        pieces.length[a:b].sum() == 16 for a, b in zip(pieces.first, pieces.first[1:], strict=False)
    )
    left = rows * 16
    for example, parts in placed(pieces).items():  # without a gap, and to the end
        assert parts[0][0] == 0
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(parts))
        covered = sum(n for _, n in parts)
        assert covered == min(lengths[example], left)
        left -= covered
    assert left == 0


def test_less_than_a_row_is_a_row():
    pieces = packing.joined(np.array([3, 4]), 16)
    assert pieces.first.tolist() == [0, 2] and pieces.length.tolist() == [3, 4]


def joined_at_once(lengths: np.ndarray, row: int) -> list[list[int]]:
    """`packing.joined` as it was defined first, on whole arrays: example, start, length, first."""
    ends = np.cumsum(lengths)
    rows = max(1, int(ends[-1]) // row)
    total = min(int(ends[-1]), rows * row)
    begins = np.array(sorted({*(ends - lengths).tolist(), *range(0, rows * row, row)}))
    begins = begins[begins < total]
    example = np.searchsorted(ends, begins, side="right")
    first = np.append(np.searchsorted(begins, np.arange(rows) * row), len(begins))
    start, length = begins - (ends - lengths)[example], np.diff(begins, append=total)
    return [x.tolist() for x in (example, start, length, first)]


def fitted_one_by_one(lengths: np.ndarray, row: int) -> list[list[int]]:
    """`packing.fitted` as it was defined first: all open rows are looked at for each example."""
    space = np.full(packing._OPEN, row)
    members: list[list[int]] = [[] for _ in space]
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        room = np.where(space >= length, space, row + 1)
        at = int(np.argmin(room))
        if room[at] > row:
            at = int(np.argmin(space))
            rows.append(members[at])
            members[at], space[at] = [], row
        members[at].append(i)
        space[at] -= length
    rows += [examples for examples in members if examples]
    example = [i for row in rows for i in row]
    first = np.cumsum([0, *map(len, rows)]).tolist()
    return [example, [0] * len(example), lengths[example].tolist(), first]


def listed(pieces: packing.Pieces) -> list[list[int]]:
    return [x.tolist() for x in (pieces.example, pieces.start, pieces.length, pieces.first)]


@pytest.mark.parametrize("block", [7, 2**18])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_those_of_the_plain_definitions(tmp_path, monkeypatch, seed, block):
    """In memory and as files, also of examples without tokens, and where rows are equally full."""
    monkeypatch.setattr(packing, "_AT_A_TIME", block)
    monkeypatch.setattr(packing, "_OPEN", 8 if seed % 2 else 256)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(seed % 2, 17, rng.integers(1, 400))
    for make, plain in ((packing.joined, joined_at_once), (packing.fitted, fitted_one_by_one)):
        expected = plain(lengths, 16)
        assert listed(make(lengths, 16)) == expected
        assert listed(make(lengths, 16, folder=tmp_path)) == expected


@pytest.mark.parametrize("make", [packing.joined, packing.alone])
def test_pieces_of_many_examples_are_never_all_in_memory(tmp_path, monkeypatch, make):
    monkeypatch.setattr(packing, "_AT_A_TIME", 1000)
    lengths = np.full(300_000, 5)
    tracemalloc.start()
    try:
        pieces = make(lengths, 16, folder=tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pieces.example) >= 300_000
    # Of one array of int64 there would be 2.4 MB; `alone` knows the first of each row.
    assert peak < (8 if make is packing.alone else 1) * 1e6


def test_rows_are_worked_out_once(tmp_path, monkeypatch):
    cache = cached(tmp_path, examples(40, 30))
    calls = []
    for name in ("fitted", "joined"):
        make = getattr(packing, name)
        counted = lambda *a, make=make, **x: calls.append(a) or make(*a, **x)  # noqa: E731
        monkeypatch.setattr(packing, name, counted)
    rows = Rows(cache, 32, pack="fitted", seed=3)
    again = Rows(cache, 32, pack="fitted", seed=3)
    assert len(calls) == 1 and again.fingerprint == rows.fingerprint
    assert all(
        jax.tree.all(jax.tree.map(np.array_equal, rows[i], again[i])) for i in range(len(rows))
    )
    # Whatever they depend on makes others.
    for changes in (
        {"length": 33},
        {"pack": "joined"},
        {"seed": 4},
        {"examples": np.arange(39)},
        {"cache": cached(tmp_path, examples(40, 30, seed=1))},
    ):
        Rows(**{"cache": cache, "length": 32, "pack": "fitted", "seed": 3, **changes})
    assert len(calls) == 6
    monkeypatch.setattr(packing, "_VERSION", packing._VERSION + 1)
    Rows(cache, 32, pack="fitted", seed=3)
    assert len(calls) == 7
    np.arange(1, 41).tofile(cache.folder / "ends.i8")  # other lengths under the same name
    assert Rows(TokenCache(cache.folder), 32, pack="fitted", seed=3).efficiency == 40 / 64
    assert len(calls) == 8


@pytest.mark.parametrize("file", ["example", "start", "length", "first", "order", "facts.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_rows_are_made_again(tmp_path, file, how):
    cache = cached(tmp_path, examples(20, 30))
    Rows(cache, 32, pack="fitted")
    (path,) = cache.folder.glob(f"rows-*/{file}")
    before = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(before[:-4])
    Rows(cache, 32, pack="fitted")
    assert path.read_bytes() == before
    assert [x.name for x in cache.folder.glob("rows-*") if x.is_dir()] == [path.parent.name]


def test_rows_that_are_found_are_not_read(tmp_path, monkeypatch):
    """To begin a run takes no longer for being large: sizes tell that they are whole."""
    cache = cached(tmp_path, examples(20, 30))
    Rows(cache, 32, pack="fitted")
    for name in ("open", "zlib"):
        monkeypatch.setitem(vars(packing), name, None)
    (folder,) = cache.folder.glob("rows-*")
    assert packing._is_whole(folder)


def test_rows_of_the_last_recipes_are_kept(tmp_path, monkeypatch):
    """What is used again counts as new, and what is read goes on being there."""
    cache = cached(tmp_path, examples(20, 30))
    monkeypatch.setattr(packing, "_KEPT", 3)
    there = lambda: {path.name for path in cache.folder.glob("rows-*")}  # noqa: E731
    first = Rows(cache, 32, pack="fitted", seed=0)
    (name,) = there()
    rows = [first[i] for i in range(len(first))]
    for seed in (1, 2, 3, 0):
        Rows(cache, 32, pack="fitted", seed=seed)
        if seed == 2:
            Rows(cache, 32, pack="fitted", seed=0)
    assert name in there() and len(there()) == 3
    for seed in (4, 5, 6):
        Rows(cache, 32, pack="fitted", seed=seed)
    assert name not in there() and len(there()) == 3
    again = [first[i] for i in range(len(first))]
    assert jax.tree.all(jax.tree.map(np.array_equal, again, rows))


def test_rows_that_cannot_be_are_not_kept(tmp_path, monkeypatch):
    """Nor those that a kill has cut short."""
    cache = cached(tmp_path, [{"ids": list(range(20))}])
    with pytest.raises(ValueError, match="an example has 20 tokens, a row 8"):
        Rows(cache, 8, pack="fitted")
    with monkeypatch.context() as patch:
        patch.setattr(packing.paths, "write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Rows(cache, 8, pack="joined")
    assert not [path for path in cache.folder.glob("rows-*") if path.is_dir()]


def test_the_fingerprint_of_rows_is_as_it_was(tmp_path):
    """Runs that were begun before go on by it."""
    cache = cached(tmp_path, examples(20, 5))
    for chosen in (None, np.arange(3, 17)[::-1]):
        order = np.random.default_rng(5).permutation(np.arange(20) if chosen is None else chosen)
        rows = Rows(cache, 8, pack="joined", seed=5, examples=chosen)
        assert rows._order.tolist() == order.tolist()
        checksum = zlib.crc32(np.sort(order).tobytes())
        assert rows.fingerprint == f"{cache.counts.digest[:32]}-{checksum:08x}"


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_what_is_held_out_is_as_it_was(share):
    shuffled = np.random.default_rng(4).permutation(50)
    out = round(share * 50)
    kept, held_out = packing.split(50, share, seed=4)
    assert kept.tolist() == sorted(shuffled[out:].tolist())
    assert held_out.tolist() == sorted(shuffled[:out].tolist())


@pytest.mark.parametrize("seed", range(3))
def test_fitted_examples_are_whole(seed, monkeypatch):
    monkeypatch.setattr(packing, "_OPEN", 8)
    lengths = np.random.default_rng(seed).integers(1, 17, 300)
    pieces = packing.fitted(lengths, 16)
    assert sorted(pieces.example) == list(range(300))
    assert np.array_equal(pieces.length, lengths[pieces.example]) and not pieces.start.any()
    used = np.add.reduceat(pieces.length, pieces.first[:-1])
    assert used.max() <= 16 and used.mean() > 0.9 * 16


def test_rows_say_what_is_learned_where(tmp_path):
    values = examples(40, 30)
    cache = cached(tmp_path, values)
    rows = Rows(cache, 32, pack="fitted", seed=3)
    seen = []
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(1, row.segments.max() + 1):
            (at,) = np.nonzero(row.segments == segment)
            assert np.array_equal(row.positions[at], np.arange(len(at)))
            ids = row.tokens[at].tolist()
            value = next(v for v in values if v["ids"] == ids)
            seen.append(values.index(value))
            labels = np.array(value["labels"])
            assert np.array_equal(row.weights[at], [*(labels[1:] != IGNORED), 0])
            assert np.array_equal(row.targets[at][:-1], ids[1:])
        empty = row.segments == 0
        assert not row.weights[empty].any()
    assert sorted(seen) == list(range(40))
    assert rows.efficiency == cache.counts.tokens / (32 * len(rows))


def test_a_document_goes_on_in_the_next_row(tmp_path):
    rows = Rows(cached(tmp_path, [{"ids": list(range(20))}]), 8, pack="joined")
    assert len(rows) == 2
    for i in range(2):
        assert rows[i].tokens.tolist() == list(range(8 * i, 8 * i + 8))
        assert rows[i].targets.tolist() == list(range(8 * i + 1, 8 * i + 9))
        assert rows[i].weights.all() and rows[i].positions.tolist() == list(range(8))


def test_too_long_for_a_row(tmp_path):
    with pytest.raises(ValueError, match="an example has 20 tokens, a row 8"):
        Rows(cached(tmp_path, [{"ids": list(range(20))}]), 8, pack="fitted")


def test_packed_rows_have_the_loss_and_gradients_of_their_examples(tmp_path):
    cache = cached(tmp_path, examples(24, 15))
    config = tiny_config(layer_windows=(5, None))

    def graded(pack: str) -> tuple[Any, Any]:
        rows = Rows(cache, 16, pack=pack)
        stack = lambda *values: np.stack(values)  # noqa: E731
        batch = batches.place(jax.tree.map(stack, *(rows[i] for i in range(len(rows)))))
        grad = jax.jit(
            jax.grad(lambda d, b: losses.loss(d, b, attend=xla, dtype=jnp.float32), has_aux=True),
            compiler_options=QUICK,
        )
        gradients, metrics = grad(tiny_decoder(config), batch)
        return metrics, named_leaves(gradients)

    with on_mesh():
        metrics, packed = graded("fitted")
        expected, single = graded("alone")
    assert metrics.targets == expected.targets
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    for name, leaf in single.items():
        most = np.abs(leaf[...]).max()
        np.testing.assert_allclose(packed[name][...], leaf[...], rtol=0, atol=1e-5 * most)


# Batches


def taken(iterator: batches.Batches, count: int) -> list[Batch]:
    return [jax.tree.map(np.asarray, next(iterator)) for _ in range(count)]


def test_batches_go_on_from_a_position_on_any_mesh(tmp_path):
    rows = Rows(cached(tmp_path, examples(60, 15)), 16, pack="fitted", seed=1)
    with on_mesh():
        whole = taken(batches.Batches(rows, 16, size=4, seed=7), 30)
    for sizes, position in (({}, 11), ({"fsdp": 4}, 0), ({"data": 2, "context": 4}, 23)):
        with on_mesh(**sizes) as mesh:
            found = batches.Batches(rows, 16, size=4, seed=7, position=position)
            first = next(found)
            assert first.tokens.sharding.mesh == mesh, meshes.describe(sizes)
            rest = [jax.tree.map(np.asarray, first), *taken(found, 4)]
        for one, other in zip(rest, whole[position:], strict=False):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    rows = Rows(cached(tmp_path, [{"ids": [i, i]} for i in range(12)]), 2, pack="alone")
    with on_mesh():
        orders = {}
        for seed in (0, 1):
            found = taken(batches.Batches(rows, 2, size=4, seed=seed), 6)
            ids = np.concatenate([batch.tokens[:, 0] for batch in found])
            orders[seed] = ids[:12].tolist(), ids[12:].tolist()
    for first, second in orders.values():
        assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert orders[0] != orders[1]


def test_once_fills_up_the_last_batch(tmp_path):
    rows = Rows(cached(tmp_path, [{"ids": [i, i]} for i in range(5)]), 2, pack="alone")
    with on_mesh():
        found = [jax.tree.map(np.asarray, batch) for batch in batches.once(rows, 4)]
    assert [batch.segments[:, 0].tolist() for batch in found] == [[1] * 4, [1, 0, 0, 0]]
    assert sorted(i for b in found for i in b.tokens[b.segments[:, 0] > 0, 0]) == list(range(5))
