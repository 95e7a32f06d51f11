import base64
import resource
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.chat.expansion import learn_tokens, main, read_words, splittable, write_tokens
from qwen_jax.chat.tokenizer import Tokenizer
from tests.support.vocabulary import qwen_tokenizer, qwen_vocab_path, tiny_ranks

# The worked example of the original's documentation, and the expansion file it prints.
EXAMPLE = (
    "我是一只猫\t20\n你是一只猫\t10\n他是一只猫\t5\n一只\t200\n一只猫\t100\n夸张的 比喻手法\t20"
)
LEARNED = ["一只猫", "只猫", "是一只猫", "我是一只猫", "你是一只猫", "他是一只猫"]


@pytest.fixture
def tiny() -> Tokenizer:
    return Tokenizer(tiny_ranks())


@pytest.fixture
def files(tmp_path) -> list[str]:
    """A tiny vocabulary, a word list, and the name of the file to write."""
    vocab = tmp_path / "tiny.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for token, i in tiny_ranks().items()]
    vocab.write_text("".join(lines))
    words = tmp_path / "words.txt"
    words.write_text("xyz\t3\na b\nab\n", encoding="utf-8")
    return [str(vocab), str(words), str(tmp_path / "out.tiktoken")]


def test_worked_example_of_the_original(tmp_path):
    words, out = tmp_path / "words.txt", tmp_path / "extra.tiktoken"
    words.write_text(EXAMPLE, encoding="utf-8")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "qwen_jax.expand_vocab", qwen_vocab_path(), words, out]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("warning: ")
    assert "6 new tokens (ids 151851..151856) for 4 words; already tokens: 1" in done.stdout
    expected = [
        f"{base64.b64encode(word.encode()).decode()} {i}\n"
        for i, word in enumerate(LEARNED, 151851)
    ]
    assert out.read_text() == "".join(expected)

    tokenizer = Tokenizer.from_file(qwen_vocab_path(), extra_vocab_file=out)
    assert tokenizer.encode("我是一只猫") == [151854]
    assert tokenizer.decode([151854], skip_special_tokens=True) == "我是一只猫"
    assert tokenizer.encode("他是一只猫。") == [151856, *qwen_tokenizer().encode("。")]
    assert tokenizer.encode("一只") == qwen_tokenizer().encode("一只")


def test_most_frequent_pair_comes_first(tiny):
    tokens = learn_tokens(tiny, {"pq": 1, "xy": 3, "xz": 2, "xyq": 2})
    assert tokens == [b"xy", b"xz", b"xyq", b"pq"]
    several = {"xy": np.int8(100), "xya": np.int8(100), "zq": np.int8(120)}  # 200 is no int8
    assert learn_tokens(tiny, several)[0] == b"xy"


def test_ties_go_to_fewer_characters_then_fewer_bytes_then_text(tiny):
    # 你 is one token of three bytes, é two tokens of one
    words = {"z你": 1, "zy": 1, "yz": 1, "é": 1}
    assert [t.decode() for t in learn_tokens(tiny, words)] == ["é", "yz", "zy", "z你"]


def test_an_existing_token_that_a_new_one_completes_is_used():
    # "xyzw" exists but cannot be reached before "xyz" does: then both must be merged
    tokenizer = Tokenizer(tiny_ranks() | {b"xyzw": 261})
    assert tokenizer.encode("xyzwq") == list(b"xyzwq")
    tokens = learn_tokens(tokenizer, {"xyz": 9, "xyzwq": 1})
    assert tokens == [b"xy", b"xyz", b"xyzwq"]


def learn_slowly(ranks: dict[bytes, int], words: dict[str, int]) -> list[bytes]:
    """The definition: encode all words anew with what was learned so far, and count."""
    learned: list[bytes] = []
    while True:
        tokenizer = Tokenizer(ranks, {token: 10_000 + i for i, token in enumerate(learned)})
        counts: Counter[bytes] = Counter()
        for word, frequency in words.items():
            parts = [tokenizer.id_to_bytes[i] for i in tokenizer.encode(word)]
            for left, right in pairwise(parts):
                counts[left + right] += frequency
        if not counts:
            return learned

        def order(
            token: bytes, counts: Counter[bytes] = counts
        ) -> tuple[int, int, int, str, bytes]:
            text = token.decode("utf-8", "replace")
            return -counts[token], len(text), len(token), text, token

        learned.append(min(counts, key=order))


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text("abcdxy你猫é", min_size=1, max_size=7), st.integers(1, 5), min_size=1, max_size=8
    )
)
def test_learner_follows_its_definition_and_every_word_becomes_one_token(words):
    ranks = tiny_ranks() | {b"xyxy": 261}
    tokenizer = Tokenizer(ranks)
    tokens = learn_tokens(tokenizer, words)
    assert tokens == learn_slowly(ranks, words)
    extra = {token: len(tokenizer) + i for i, token in enumerate(tokens)}
    assert len(extra) == len(tokens) and not extra.keys() & tokenizer.ranks.keys()
    expanded = Tokenizer(ranks, extra)
    assert [len(expanded.encode(word)) for word in words] == [1] * len(words)


def test_words_that_would_be_split_are_refused(tiny):
    words = ["abc", "a b", "a1", "12", "!?", "你好，", "x\ny", "don't", " x"]
    assert splittable(words) == ["a b", "a1", "12", "你好，", "x\ny", "don't"]
    with pytest.raises(ValueError, match="'a b'"):
        learn_tokens(tiny, {"a b": 1})


def test_existing_words_teach_nothing(tiny):
    assert learn_tokens(tiny, {"ab": 5, "abcd": 5}) == []
    assert learn_tokens(tiny, {}) == []


def test_word_list(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(
        "\ufeffone\t3\r\n two \t 4 \n\n\t7\nthree\nfour\tmany\nfive\t-2\n"
        "one\t2\ne\u0301\t1\né\t1\n",
        encoding="utf-8",
    )
    assert read_words(path) == {"one": 5, "two": 4, "three": 1, "four": 1, "five": 1, "é": 2}
    path.write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(ValueError, match=r"words\.txt: not a UTF-8"):
        read_words(path)
    path.write_text(f"one\ntwo\t{'9' * 5000}\n")
    with pytest.raises(ValueError, match=r"words\.txt:2: a frequency of 5000 digits"):
        read_words(path)


def test_command(files, capsys):
    assert main([*files, "--start-id", "500"]) == 0
    assert Path(files[2]).read_text() == "eHk= 500\neHl6 501\n"
    streams = capsys.readouterr()
    assert streams.err == "warning: 'a b' refused: the pre-tokenizer splits it\n"
    assert "2 new tokens (ids 500..501) for 1 words; already tokens: 1" in streams.out


def test_ids_begin_after_the_special_tokens(files):
    assert main(files) == 0
    assert Path(files[2]).read_text() == "eHk= 469\neHl6 470\n"


def test_an_existing_file_is_never_overwritten(files, capsys):
    Path(files[2]).write_text("precious")
    assert main(files) == 1
    assert "exists already" in capsys.readouterr().err
    assert Path(files[2]).read_text() == "precious"
    with pytest.raises(FileExistsError):
        write_tokens(files[2], [b"x"], start_id=500)
    with pytest.raises(ValueError, match="from 0 to 2147483646"):
        write_tokens(files[2], [b"x", b"y"], start_id=2**31 - 1)


def test_a_full_disk_leaves_nothing(tmp_path):
    out = tmp_path / "extra.tiktoken"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError):
            write_tokens(out, [b"%d" % i for i in range(10_000)], start_id=500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: [f[0] + "x", *f[1:]], "tiny.tiktokenx does not exist: give the qwen.tiktoken"),
        (lambda f: [f[0], f[1] + "x", f[2]], "No such file"),
        (lambda f: [f[1], *f[1:]], "expected 'base64 id'"),
        (lambda f: [f[0], f[0] + "/..", f[2]], "directory"),
        (lambda f: [f[0], f[1], f[2] + "/no/out"], "no such folder"),
        (lambda f: [*f, "--start-id", "468"], "--start-id 468: must be at least 469"),
        (lambda f: [*f, "--start-id", "5000000000"], "must be at most 2147483647, as ids are i"),
    ],
)
def test_errors_are_one_line(files, capsys, change, message):
    assert main(change(files)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path(files[2]).exists()


def test_usage(files, capsys):
    with pytest.raises(SystemExit) as caught:
        main(files[:2])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "word<TAB>frequency" in capsys.readouterr().out
    with pytest.raises(ValueError):
        main([files[0], files[1], files[2], "--start-id", "0", "--debug"])
