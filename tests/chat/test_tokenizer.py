import base64
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.chat.tokenizer import SPECIAL_TOKENS, TextStream, Tokenizer
from tests.support.vocabulary import qwen_tokenizer, qwen_vocab_path, tiny_ranks, write_tiny_vocab

# Figures made by running the original tokenizer on the published vocabulary.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text("utf-8"))


def write_vocab(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def tiny() -> Tokenizer:
    return Tokenizer(tiny_ranks())


@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: ascii(case["text"][:20]))
def test_encode_and_decode_match_the_original(case):
    tokenizer = qwen_tokenizer()
    assert tokenizer.encode(case["text"]) == case["ids_no_special"]
    assert tokenizer.encode(case["text"], allowed_special="all") == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip"]


@pytest.mark.parametrize("case", GOLDEN["decode_errors"], ids=lambda case: str(case["ids"]))
def test_broken_utf8_matches_the_original(case):
    tokenizer = qwen_tokenizer()
    assert tokenizer.decode(case["ids"]) == case["replace"]
    assert tokenizer.decode(case["ids"], errors="ignore") == case["ignore"]


def test_vectors_of_the_original_documentation():
    tokenizer = qwen_tokenizer()
    code = 'print("<|endoftext|>")'
    assert tokenizer.encode(code) == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert tokenizer.encode(code, allowed_special="all") == [1350, 445, 151643, 899]
    assert tokenizer.decode([51461, 117]) == " 根"
    assert tokenizer.decode([51461]).endswith("\ufffd")
    for text, ids in {"\n": [198], "system": [8948], "user": [872], "assistant": [77091]}.items():
        assert tokenizer.encode(text) == ids
    assert [tokenizer.encode(" " + c)[0] for c in "ABCD"] == [362, 425, 356, 422]
    assert [tokenizer.encode(c)[0] for c in "ABCD"] == [32, 33, 34, 35]


def test_contractions_end_a_piece_in_either_case():
    tokenizer = qwen_tokenizer()
    for left, right in ("'ll", "ama"), ("'LL", "AMA"), ("'S", "TOP"), ("'rE", "st"):
        assert tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right)


def test_special_ids_of_the_published_vocabulary():
    tokenizer = qwen_tokenizer()
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (
        151643,
        151644,
        151645,
    )
    assert (tokenizer.extra_ids[0], tokenizer.extra_ids[-1]) == (151646, 151850)
    assert len(tokenizer) == 151851


def test_special_tokens_are_text_unless_allowed():
    tokenizer = qwen_tokenizer()
    text = "<|im_start|>x<|im_end|><|extra_7|>"
    assert max(tokenizer.encode(text)) < tokenizer.eod_id
    only_end = tokenizer.encode(text, allowed_special={"<|im_end|>"})
    assert [i for i in only_end if i >= tokenizer.eod_id] == [tokenizer.im_end_id]
    everything = tokenizer.encode(text, allowed_special="all")
    assert [i for i in everything if i >= tokenizer.eod_id] == [151644, 151645, 151653]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
@pytest.mark.parametrize("value", [{"<|im_sep|>"}, ["<|extra_205|>"], "<|im_end|>", "al"])
def test_unknown_special_is_refused(tiny, argument, value):
    with pytest.raises(ValueError, match="special tokens"):
        tiny.encode("no such thing", **{argument: value})


def test_disallowed_special_raises_only_where_found(tiny):
    with pytest.raises(ValueError, match="im_end"):
        tiny.encode("a<|im_end|>", disallowed_special={"<|im_end|>"})
    with pytest.raises(ValueError, match="im_end"):
        tiny.encode("a<|im_end|>", disallowed_special="all")
    assert tiny.encode("a<|im_end|>", disallowed_special={"<|im_start|>"}) == list(b"a<|im_end|>")
    assert tiny.encode("<|im_end|>", {"<|im_end|>"}, disallowed_special="all") == [tiny.im_end_id]


def test_text_is_normalised_before_anything_else(tiny):
    assert tiny.encode("e\u0301") == list("é".encode())
    # the combining slash joins the last character: what is left is no special token
    assert tiny.im_end_id not in tiny.encode("<|im_end|>\u0338", allowed_special="all")


@given(st.text())
def test_decode_undoes_encode(text):
    tokenizer = qwen_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_lone_surrogates_become_replacement_characters(tiny):
    assert tiny.decode(tiny.encode("a\ud800b")) == "a\ufffdb"
    assert tiny.decode(tiny.encode("\ud83d\ude00")) == "😀"


@pytest.mark.parametrize(
    "character, end",
    [
        (" ", ""),
        (" ", "x"),
        ("\t", "1"),
        ("\u3000", "x"),
        ("\n", ""),
        ("a", ""),
        ("!", ""),
        ("中", ""),
    ],
)
def test_a_million_of_one_character(character, end):
    """It ends: a pattern that goes back over each run would take hours, this one half a second."""
    tokenizer = qwen_tokenizer()
    text = character * 10**6 + end
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_white_space_is_split_as_by_the_plain_pattern():
    tokenizer = qwen_tokenizer()
    plain = tiktoken.Encoding(
        "plain",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks=tokenizer.ranks,
        special_tokens={},
    )
    for length in [1, 2, 3, *range(254, 261), *range(510, 517), 1000]:
        for space in " ", "\t", "\u3000", " \t":
            for before in "", "a", "!", "\n":
                for after in "", "x", "1", "!", "\n", "\nx", " \n x":
                    text = before + space * length + after
                    assert tokenizer.encode(text) == plain.encode_ordinary(text), ascii(text)


@pytest.mark.parametrize("ids", [[151851], [151935], [152063]])
def test_ids_that_fill_up_a_model_are_undecodable_bytes(ids):
    tokenizer = qwen_tokenizer()
    assert tokenizer.decode([64, *ids, 65]) == "a\ufffdb"
    assert tokenizer.decode([64, *ids, 65], errors="ignore") == "ab"
    with pytest.raises(ValueError):
        tokenizer.decode([64, *ids, 65], errors="strict")


@pytest.mark.parametrize("i", [-1, 10**9, 2**40, 152_576])
def test_ids_that_no_model_has_are_refused(i):
    for work in (qwen_tokenizer().decode, TextStream(qwen_tokenizer()).push):
        with pytest.raises(
            ValueError, match=rf"^ids: token id {i} is out of range: from 0 to 15257"
        ):
            work([64, i])


@pytest.mark.parametrize(
    ("ranks", "extra", "message"),
    [
        ({b"a": 0}, None, r"^ranks: 1 tokens, but none for 255 of the 256 bytes \(the first: 0x00"),
        ({}, None, "^ranks: 0 tokens, but none for 256"),
        (None, None, "^ranks must map tokens .bytes. to ids, got None"),
        ([b"a"], None, "^ranks must map tokens"),
        (tiny_ranks() | {b"xyz": 300}, None, "^ranks must be 0 to 261, each of them once"),
        (tiny_ranks() | {b"xyz": -1}, None, "^ranks: ids: token id -1 is out of range"),
        (tiny_ranks() | {b"xyz": "261"}, None, "^ranks: ids must be whole numbers"),
        (tiny_ranks() | {"xyz": 261}, None, "^ranks: tokens must be bytes, got str 'xyz'"),
        (tiny_ranks(), {"xyz": 500}, "^extra: tokens must be bytes, got str 'xyz'"),
        (tiny_ranks(), {b"xyz": 5.0}, "^extra: ids must be whole numbers"),
        (tiny_ranks(), {b"xyz": 2**40}, "^extra: ids: token id 1099511627776 is out of range"),
    ],
)
def test_vocabularies_that_are_none(ranks, extra, message):
    """tiktoken would panic over them."""
    with pytest.raises(ValueError, match=message):
        Tokenizer(ranks, extra)


def test_ids_of_numpy_are_ids():
    ranks = {token: np.int64(rank) for token, rank in tiny_ranks().items()}
    tokenizer = Tokenizer(ranks, {b"xy": np.int32(500)})
    assert tokenizer.encode("xyab") == [500, 256] and type(tokenizer.encode("xy")[0]) is int


def test_a_vocabulary_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/no does not exist: give the qwen\.tik"):
        Tokenizer.from_file(tmp_path / "no")
    with pytest.raises(ValueError, match=rf"^{tmp_path} is a folder: give the vocabulary in it"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path} is a folder"):
        Tokenizer.from_file(write_tiny_vocab(tmp_path / "a"), tmp_path)


def test_decode_takes_arrays(tiny):
    assert tiny.decode(np.array([256, 257], dtype=np.int32)) == "abcd"


def test_known_ids_leave_out_the_padding():
    known = qwen_tokenizer().known_ids(151936)
    assert known.dtype == bool and known.shape == (151936,)
    assert known[:151851].all() and not known[151851:].any()
    assert qwen_tokenizer().known_ids(10).all()
    sparse = Tokenizer(tiny_ranks(), {b"xyz": 500}).known_ids(510)
    assert sparse[:469].all() and not sparse[469:500].any() and sparse[500]
    assert sparse.sum() == 470


broken_ids = st.one_of(
    st.integers(0, 255),  # in the published vocabulary too, the first 256 ids are the bytes
    st.integers(90_000, 151_642),
    st.integers(151_643, 151_852),
    st.sampled_from([151_935, 152_063]),
)


@settings(max_examples=300)
@given(st.lists(st.lists(broken_ids, max_size=3), max_size=20), st.booleans())
def test_stream_equals_decode(chunks, skip):
    tokenizer = qwen_tokenizer()
    for errors in "replace", "ignore":
        stream = TextStream(tokenizer, errors=errors, skip_special_tokens=skip)
        text = "".join([stream.push(chunk) for chunk in chunks]) + stream.flush()
        ids = [i for chunk in chunks for i in chunk]
        assert text == tokenizer.decode(ids, errors=errors, skip_special_tokens=skip)


@given(st.text())
def test_stream_of_good_text_never_shows_a_replacement(text):
    text = text.replace("\ufffd", "")
    tokenizer = Tokenizer(tiny_ranks())
    stream = TextStream(tokenizer)
    pushed = [stream.push([byte]) for byte in unicodedata.normalize("NFC", text).encode()]
    assert "\ufffd" not in "".join(pushed)
    assert "".join(pushed) == unicodedata.normalize("NFC", text)  # all of it, before any flush


def test_stream_holds_back_an_unfinished_character(tiny):
    stream = TextStream(tiny)
    assert [stream.push([byte]) for byte in "😀".encode()] == ["", "", "", "😀"]
    assert stream.push([0xE4]) == ""
    assert stream.push([tiny.im_end_id]) == "\ufffd<|im_end|>"  # now certain
    assert stream.push([0xE4]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push([97]) == "a"


def test_stream_skips_special_tokens_on_request(tiny):
    stream = TextStream(tiny, skip_special_tokens=True)
    assert stream.push([259, tiny.im_end_id]) == ""
    assert stream.push([0xA0]) == "你"


def test_a_smaller_vocabulary_is_followed_by_the_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_file(write_vocab(tmp_path / "tiny.tiktoken", tiny_ranks()))
    assert tokenizer.eod_id == 261
    assert [tokenizer.special_tokens[token] for token in SPECIAL_TOKENS] == list(range(261, 469))
    assert len(tokenizer) == 469
    assert tokenizer.encode("abcd你x") == [258, 260, ord("x")]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda lines: [*lines[:9], "!!! 9\n"], r":10: expected 'base64 id', found '!!! 9'"),
        (lambda lines: ["version https://git-lfs\n"], r":1: expected 'base64 id'"),
        (lambda lines: ["<!DOCTYPE html>\n"], r":1: expected 'base64 id'"),
        (lambda lines: [*lines[:300], "YWJj\n"], r":301: expected 'base64 id'"),
        (lambda lines: [*lines[:300], "YWJj -1\n"], r":301: expected 'base64 id'"),
        (lambda lines: [*lines[:300], *lines[301:]], r":301: expected rank 300, found 301"),
        (lambda lines: [*lines[:300], lines[300][:-2]], r":301: expected rank 300, found 30$"),
        (lambda lines: [*lines[:300], "YQ== 300\n"], r":301: b'a' already has rank 64"),
        (lambda lines: lines[:100], r"100 tokens, but none for 156 of the 256 bytes"),
        (lambda lines: [], r"0 tokens, but none for 256"),
        (lambda lines: lines[:100_000], r"vocabulary of 151643 tokens, but has 100000"),
        (lambda lines: [*lines, "5LiA5Y+q54yr 151643\n"], r"tokens, but has 151644"),
    ],
)
def test_wrong_vocabulary_files_are_refused(tmp_path, spoil, message):
    lines = qwen_vocab_path().read_text().splitlines(keepends=True)
    path = tmp_path / "spoilt.tiktoken"
    path.write_text("".join(spoil(lines)))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_expansion_may_be_sparse_and_skips_what_exists(tmp_path):
    vocab = write_vocab(tmp_path / "tiny.tiktoken", tiny_ranks())
    extra = tmp_path / "extra.tiktoken"
    # "ab" exists; "abc" comes twice; a blank line and no newline at the end are fine
    extra.write_text("YWI= 900\n\nYWJj 600\nYWJj 601\neHl6 500")
    tokenizer = Tokenizer.from_file(vocab, extra_vocab_file=extra)
    assert len(tokenizer) == 601
    assert tokenizer.encode("ab") == [256]
    assert tokenizer.encode("abc\nxyz") == [600, ord("\n"), 500]
    assert tokenizer.decode([600, 601, 900, 500]) == "abc\ufffd\ufffdxyz"


def test_skipping_special_tokens_keeps_an_expansion():
    tokenizer = Tokenizer(tiny_ranks(), {b"xyz": 469})
    ids = [tokenizer.eod_id, 469, tokenizer.extra_ids[-1], 97]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "xyza"
    stream = TextStream(tokenizer, skip_special_tokens=True)
    assert stream.push(ids) == "xyza"


@pytest.mark.parametrize(
    "text, message",
    [
        ("eHl6 469\nYWJj 468\n", "id 468 of b'abc' is taken by b'<|extra_204|>'"),
        ("eHl6 97\n", "id 97 of b'xyz' is taken by b'a'"),
        ("eHl6 500\nYWJj 500\n", "id 500 of b'abc' is taken by b'xyz'"),
        ("eHl6 500\nYWJj\n", ":2: expected 'base64 id', found 'YWJj'"),
        ("eHl6 500\n\nYW*Jj 501\n", ":3: expected 'base64 id'"),
        ("eHl6 5_00\n", ":1: expected 'base64 id'"),
        ("eHl6 99999999999\n", ":1: expected 'base64 id'"),
    ],
)
def test_wrong_expansions_are_refused(tmp_path, text, message):
    vocab = write_vocab(tmp_path / "tiny.tiktoken", tiny_ranks())
    extra = tmp_path / "extra.tiktoken"
    extra.write_text(text)
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_file(vocab, extra_vocab_file=extra)
    assert str(caught.value).startswith(str(extra)) and message in str(caught.value)


NEW = ["只猫", "一只猫", "是一只猫"]


def lines_of(tokens: list[str], first: int) -> str:
    pairs = enumerate(tokens, first)
    return "".join(f"{base64.b64encode(token.encode()).decode()} {i}\n" for i, token in pairs)


def test_an_expansion_in_the_vocabulary_itself(tmp_path):
    """As the original's tokenizer saves one: after the special tokens. Ids may be sparse there."""
    path = tmp_path / "qwen.tiktoken"
    whole = qwen_vocab_path().read_text()
    path.write_text(whole + lines_of(NEW, 151851))
    tokenizer = Tokenizer.from_file(path)
    assert len(tokenizer) == 151854 and tokenizer.eod_id == 151643
    assert tokenizer.encode("我是一只猫") == [35946, 151853]
    path.write_text(whole + lines_of(NEW[:1], 151900))
    assert len(Tokenizer.from_file(path)) == 151901


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n  \n",
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
    ],
    ids=["CRLF", "blank lines", "byte order mark", "no last line end"],
)
def test_how_lines_end_does_not_matter(tmp_path, change):
    path = write_vocab(tmp_path / "tiny.tiktoken", tiny_ranks())
    text = path.read_text() + lines_of(NEW, 469)
    path.write_bytes(change(text).encode())
    tokenizer = Tokenizer.from_file(path)
    assert len(tokenizer) == 472 and tokenizer.encode("一只猫") == [470]
    extra = tmp_path / "extra.tiktoken"
    extra.write_bytes(change(lines_of([*NEW, "abx"], 600)).encode())
    assert Tokenizer.from_file(path, extra).encode("一只猫\nabx") == [470, 10, 603]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lines_of(NEW, 261 + 100), ":262: expected rank 261, found 361"),
        (lines_of(NEW, 470), ":262: expected rank 261, found 470"),
        (lines_of(NEW, 469) + lines_of(["x猫"], 471), ":265: id 471 of b'x.*taken by"),
        (lines_of(NEW, 469) + lines_of(["x猫"], 300), ":265: id 300 of .*extra_36"),
        (lines_of(NEW, 469) + lines_of(["x猫"], 5), r":265: id 5 of .* taken by b'\\x05'"),
        (lines_of([*NEW, NEW[0]], 469), ":265: .*already has rank 469"),
        ("YWJk 469\nYWJkZ= 470\n", ":263: expected 'base64 id'"),
        ("YWJk 469\nYWJkZR== 470\n", ":263: expected 'base64 id'"),
    ],
)
def test_wrong_expansions_in_the_vocabulary_are_refused(tmp_path, more, message):
    path = write_vocab(tmp_path / "tiny.tiktoken", tiny_ranks())
    path.write_text(path.read_text() + more)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_file(path)


def test_a_gap_in_the_published_vocabulary_is_no_expansion(tmp_path):
    lines = qwen_vocab_path().read_text().splitlines(keepends=True)
    path = tmp_path / "cut.tiktoken"
    path.write_text("".join(lines[:30_000] + lines[30_208:30_210]))
    with pytest.raises(ValueError, match=":30001: expected rank 30000, found 30208"):
        Tokenizer.from_file(path)
