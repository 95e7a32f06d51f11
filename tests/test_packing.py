"""The token cache, and rows made of it: what is in them, and that packing changes no loss."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import meshes
from qwen_jax.attention import xla
from qwen_jax.weights import named_leaves
from tests.tiny import QUICK, on_mesh, tiny_config, tiny_decoder
from tests.vocabulary import qwen_tokenizer
from train import batches, data, packing, records, token_cache
from train import loss as losses
from train.loss import IGNORED, Batch
from train.packing import Rows
from train.token_cache import Encoding, TokenCache

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
    return token_cache.make([file], qwen_tokenizer(), encoding, folder / "cache")


def make_again(folder: Path, **changes: Any) -> TokenCache:
    encoding = dataclasses.replace(PLAIN, **changes)
    file = folder / "data.jsonl"
    return token_cache.make([file], qwen_tokenizer(), encoding, folder / "cache")


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
        [file], qwen_tokenizer(), dataclasses.replace(encoding, **x), tmp_path / "cache"
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
    return [path for path in (home / "cache").iterdir() if path.is_dir()]


def test_another_host_may_be_quicker(tmp_path, monkeypatch):
    """Where the lock does not hold: its cache is used, and nothing else is left."""
    values = examples(10, 5)
    fill = token_cache._fill

    def slow(*arguments: Any) -> None:
        fill(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "_fill", fill)
            patch.setattr(token_cache.fcntl, "flock", lambda *_: None)
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
    folder.rename(own)
    other.mkdir()
    make_again(tmp_path)
    assert sorted(folders(tmp_path)) == sorted([folder, other])


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
    return token_cache.make(files, qwen_tokenizer(), encoding, folder / "cache")


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
    rows = Rows(cache, 32, "fitted", seed=3)
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
    rows = Rows(cached(tmp_path, [{"ids": list(range(20))}]), 8, "joined")
    assert len(rows) == 2
    for i in range(2):
        assert rows[i].tokens.tolist() == list(range(8 * i, 8 * i + 8))
        assert rows[i].targets.tolist() == list(range(8 * i + 1, 8 * i + 9))
        assert rows[i].weights.all() and rows[i].positions.tolist() == list(range(8))


def test_too_long_for_a_row(tmp_path):
    with pytest.raises(ValueError, match="an example has 20 tokens, a row 8"):
        Rows(cached(tmp_path, [{"ids": list(range(20))}]), 8, "fitted")


def test_packed_rows_have_the_loss_and_gradients_of_their_examples(tmp_path):
    cache = cached(tmp_path, examples(24, 15))
    config = tiny_config(layer_windows=(5, None))

    def graded(pack: str) -> tuple[Any, Any]:
        rows = Rows(cache, 16, pack)
        stack = lambda *values: np.stack(values)  # noqa: E731
        batch = losses.place(jax.tree.map(stack, *(rows[i] for i in range(len(rows)))))
        grad = jax.jit(
            jax.grad(lambda d, b: losses.loss(d, b, xla, jnp.float32), has_aux=True),
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
    rows = Rows(cached(tmp_path, examples(60, 15)), 16, "fitted", seed=1)
    with on_mesh():
        whole = taken(batches.Batches(rows, 16, 4, 7), 30)
    for sizes, position in (({}, 11), ({"fsdp": 4}, 0), ({"data": 2, "context": 4}, 23)):
        with on_mesh(**sizes) as mesh:
            found = batches.Batches(rows, 16, 4, 7, position)
            first = next(found)
            assert first.tokens.sharding.mesh == mesh, meshes.describe(sizes)
            rest = [jax.tree.map(np.asarray, first), *taken(found, 4)]
        for one, other in zip(rest, whole[position:], strict=False):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    rows = Rows(cached(tmp_path, [{"ids": [i, i]} for i in range(12)]), 2, "alone")
    with on_mesh():
        orders = {}
        for seed in (0, 1):
            found = taken(batches.Batches(rows, 2, 4, seed), 6)
            ids = np.concatenate([batch.tokens[:, 0] for batch in found])
            orders[seed] = ids[:12].tolist(), ids[12:].tolist()
    for first, second in orders.values():
        assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert orders[0] != orders[1]


def test_once_fills_up_the_last_batch(tmp_path):
    rows = Rows(cached(tmp_path, [{"ids": [i, i]} for i in range(5)]), 2, "alone")
    with on_mesh():
        found = [jax.tree.map(np.asarray, batch) for batch in batches.once(rows, 4)]
    assert [batch.segments[:, 0].tolist() for batch in found] == [[1] * 4, [1, 0, 0, 0]]
    assert sorted(i for b in found for i in b.tokens[b.segments[:, 0] > 0, 0]) == list(range(5))
