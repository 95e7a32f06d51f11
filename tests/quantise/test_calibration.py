"""Calibration data: which rows conversations and texts become."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.chat import examples
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.quantise import calibration
from qwen_jax.quantise.calibration import Rows
from tests.support.vocabulary import qwen_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return qwen_tokenizer()


def turns(*said: str) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return {"conversations": [{"from": roles[i % 2], "value": x} for i, x in enumerate(said)]}


def written(path: Path, *records: object) -> list[Path]:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return [path]


def read(sources: list[Path], tokenizer: Tokenizer, **settings: Any) -> Rows:
    wanted = {"length": 64, "least": 1, "most": 100, "seed": 0, **settings}
    return calibration.read(sources, tokenizer, **wanted)


def test_conversations_share_rows_and_long_ones_are_cut(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chats = [turns(f"Say {word}.", word) for word in ("one", "two", "three", "four")]
    chats.append(turns("Say it often.", "often " * 80))
    found = read(written(tmp_path / "a.jsonl", *chats), tokenizer, length=100)
    pieces = []
    for row in range(len(found)):
        segments = found.segments[row]
        assert np.all(found.tokens[row][segments == 0] == 0)
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(found.positions[row, at], np.arange(len(at)))
            pieces.append(found.tokens[row, at].tolist())
    expected = [
        examples.chat_example(tokenizer, chat, system="You are a helpful assistant.", max_len=100)[
            0
        ]
        for chat in chats
    ]
    assert len(expected[-1]) == 100
    assert sorted(pieces) == sorted(expected) and len(found) < len(chats)
    assert found.counted == sum(map(len, expected))


def test_a_text_goes_on_in_the_next_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "".join(f"Line {number} of the text.\n" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    found = read([tmp_path / "a.txt"], tokenizer)
    ids = [*tokenizer.encode(text), tokenizer.eod_id]
    rows = [ids[at : at + 64] for at in range(0, len(ids), 64)]
    assert sorted(row[: int(n)].tolist() for row, n in zip(
        found.tokens, np.count_nonzero(found.segments, axis=1), strict=True
    )) == sorted(rows)  # fmt: skip

    some = read([tmp_path / "a.txt"], tokenizer, most=5)
    again = read([tmp_path / "a.txt"], tokenizer, most=5)
    others = read([tmp_path / "a.txt"], tokenizer, most=5, seed=1)
    assert len(some) == 5 and some.digest() == again.digest() != others.digest()


def test_rows_are_chosen_among_eight_times_as_many(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "".join(f"Line {number} of the text.\n" for number in range(400))
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer.encode(text)
    found = read([tmp_path / "a.txt"], tokenizer, most=3, seed=5)
    first = [number * 64 for number in np.random.default_rng(5).permutation(24)[:3]]
    assert len(ids) > 64 * 30 and max(first) >= 64 * 3
    assert found.tokens.tolist() == [ids[at : at + 64] for at in first]


def test_a_digest_is_of_all_that_a_pass_sees() -> None:
    whole = calibration.of_tokens(np.arange(12, dtype=np.int32).reshape(2, 6))
    others = [
        dataclasses.replace(whole, **{name: getattr(whole, name) + 1})
        for name in ("tokens", "positions", "segments")
    ]
    others += [whole.part(slice(1)), calibration.of_tokens(whole.tokens.reshape(3, 4))]
    assert len({rows.digest() for rows in (whole, *others)}) == 6


def test_records_are_texts_where_they_have_the_field(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = written(tmp_path / "a.jsonl", {"body": "word " * 99, "text": 3}, {"body": "x"})
    found = read(documents, tokenizer, field="body")
    assert found.counted == sum(len(tokenizer.encode(text)) + 1 for text in ("word " * 99, "x"))


def test_bad_data_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = turns("Say it often.", "often " * 80)
    for number, (records, settings, message) in enumerate((
        ([long, turns("Nobody answers.")], {}, r"line 2: the conversation has no reply to a user"),
        ([long, {"prompt": "x"}], {}, r"line 2: there are neither 'conversations' nor 'messages'"),
        ([{"text": ""}], {}, r"line 1: there is no text in 'text'"),
        ([{"text": "short"}], {}, r"the calibration data has \d+ tokens, which are 1 rows of 64"),
        ([long], {"least": 3}, r"which are \d rows of 64, and 3 full ones are needed: give more"),
    )):  # fmt: skip
        sources = written(tmp_path / f"{number}.jsonl", *records)
        with pytest.raises(ValueError, match=message):
            read(sources, tokenizer, **settings)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1: no JSON"):
        read([tmp_path / "bad.jsonl"], tokenizer)
