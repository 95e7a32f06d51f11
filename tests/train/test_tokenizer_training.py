"""A vocabulary learned from text is one that Qwen's tokenizer reads."""

import json

import pytest

from qwen_jax.chat.tokenizer import Tokenizer
from tests.support.training import fail, succeed
from train import tokenizer

TEXT = "The lowest of the low lights glow slowly; 你好，世界。 Ünïcode\n" * 40


def learned(tmp_path, size: int, text: str = TEXT) -> Tokenizer:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    out = tmp_path / "qwen.tiktoken"
    succeed(
        [str(x) for x in ("--data", tmp_path / "text.jsonl", "--size", size, "--out", out)],
        tokenizer,
    )
    return Tokenizer.from_file(out)


def test_text_comes_back_in_fewer_tokens(tmp_path):
    vocabulary = learned(tmp_path, 300)
    assert vocabulary.eod_id == 300, "control tokens come after"
    ids = vocabulary.encode(TEXT)
    assert vocabulary.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) / 2
    other = "anything: \x00 🜁 <|im_end|>"
    assert vocabulary.decode(vocabulary.encode(other)) == other


def test_it_says_what_a_model_needs_and_makes_its_folder(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    out = tmp_path / "new" / "folder" / "qwen.tiktoken"
    given = ("--data", tmp_path / "text.jsonl", "--size", 300, "--out", out)
    succeed([str(x) for x in given], tokenizer)
    said = capsys.readouterr().err
    size = len(Tokenizer.from_file(out))
    assert f'config.json needs "vocab_size": {size}, or more' in said and size > 300


def test_what_is_frequent_is_merged_first(tmp_path):
    """By hand: `aab` 30 times and `ab` 10 times, pieces of their own. The pairs are ab 40, aa 30;
    then a-ab 30.
    """
    vocabulary = learned(tmp_path, 258, "\n".join(["aab"] * 30 + ["ab"] * 10))
    tokens = [vocabulary.id_to_bytes[i] for i in range(258)]
    assert sorted(tokens[:256]) == [bytes([i]) for i in range(256)]
    assert tokens[256:] == [b"ab", b"aab"]


@pytest.mark.parametrize(
    ("text", "size", "problem"),
    [
        ("ab", 256, "--size 256: must be more than 256, as every byte is a token"),
        ("ab", 10**20, "--size 100000000000000000000: must be at most 10000000"),
        ("ab", 300, "the texts give 257 tokens, not 300: give more text, or a smaller --size"),
        (None, 300, "text.jsonl line 1: there is no text in 'text'"),
    ],
)
def test_what_cannot_be(tmp_path, capsys, text, size, problem):
    data, out = tmp_path / "text.jsonl", tmp_path / "qwen.tiktoken"
    data.write_text(json.dumps({"text": text}))
    arguments = [str(x) for x in ("--data", data, "--size", size, "--out", out)]
    assert problem in fail(capsys, arguments, tokenizer) and not out.exists()


def test_an_earlier_one_is_never_overwritten(tmp_path, capsys):
    learned(tmp_path, 300)
    arguments = ["--data", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "qwen.tiktoken")]
    assert "exists: give another --out" in fail(capsys, arguments, tokenizer)


def test_two_at_a_time_do_not_write_one_file(tmp_path, capsys, monkeypatch):
    def again(*_: object) -> dict[bytes, int]:
        assert "has been at work there since" in fail(capsys, arguments, tokenizer)
        return {b"a": 0}

    out = tmp_path / "qwen.tiktoken"
    arguments = ["--data", "none.txt", "--out", str(out)]
    monkeypatch.setattr(tokenizer, "learn", again)
    succeed(arguments, tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["qwen.tiktoken"]
