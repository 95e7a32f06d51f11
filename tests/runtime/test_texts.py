"""What is no text is refused by name, wherever texts come in: arguments, files, records."""

import ast
import codecs
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import chat, expand_vocab
from qwen_jax.chat import tools
from qwen_jax.chat.tokenizer import TextStream, Tokenizer
from qwen_jax.checkpoint.directory import write_json
from qwen_jax.decoding import inputs
from qwen_jax.runtime import paths, records, texts
from qwen_jax.runtime.texts import read_json
from tests.support.vocabulary import tiny_ranks, write_tiny_vocab
from train import data
from train import tokenizer as learning

ROOT = Path(__file__).resolve().parents[2]
TINY = Tokenizer(tiny_ranks())
ASKED = {"role": "user", "content": "My name is Ann."}
SAID = {"role": "assistant", "content": "Hello Ann."}
TALK = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]


def prompt(query: Any = "q", history: Any = (), system: Any = "S", **more: Any) -> Any:
    return chat.make_context(TINY, query, history, system, **more)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "got None"),
        (b"a", "got bytes b'a': decode them first"),
        ([1, 2], r"got list \[1, 2\]"),
        (np.arange(3), r"got ndarray array\(\[0, 1, 2\]\)"),
    ],
)
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("query", lambda value: prompt(value)),
        ("query", lambda value: prompt(value, chat_format="raw")),
        ("system", lambda value: prompt(system=value)),
        ("history: the query of pair 1", lambda value: prompt(history=[(value, "a")])),
        ("history: the reply of pair 2", lambda value: prompt(history=[("a", "b"), ("a", value)])),
        ("system", lambda value: chat.turns_of([ASKED, SAID], value)),
        ("text", TINY.encode),
        ("system", lambda value: data.sft_example(TINY, TALK, value, 9)),
        ("each word", lambda value: expand_vocab.splittable(["a", value])),
        ("each text", lambda value: learning.learn(["a", value], 300)),
    ],
)
def test_arguments_that_are_no_text(name, work, value, got):
    with pytest.raises(ValueError, match=rf"^{name} must be text \(str\), {got}") as caught:
        work(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "work",
    [
        prompt,
        lambda text: prompt(system=text),
        lambda text: prompt(history=[("a", text)]),
        lambda text: chat.turns_of([ASKED, SAID | {"content": text}], ""),
        lambda text: tools.instruction([{"name": text}]),
        lambda text: tools.turns([ASKED, {"role": "assistant", "tool_calls": [{"name": text}]}]),
        lambda text: data.text_example(TINY, {"text": text}),
        lambda text: data.sft_example(TINY, [TALK[0], TALK[1] | {"value": text}], "", None),
        lambda text: data.chat_example(TINY, {"conversations": TALK}, system=text, max_len=None),
        lambda text: expand_vocab.splittable([text]),
    ],
)
def test_half_a_character(work):
    work("a\U0001f40b")
    work("a\ud83d\udc0b")  # both halves: JavaScript's way of writing it
    with pytest.raises(ValueError, match=r"holds half a character, '\\ud83d', at "):
        work("a\ud83d")


def test_texts_of_numpy_are_texts():
    pairs = np.array([["ab", "cd"]])
    plain = prompt("q", [("ab", "cd")])
    assert prompt(np.str_("q"), pairs, np.str_("S")) == plain
    assert type(prompt(np.str_("q"), chat_format="raw")[0]) is str


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([ASKED, SAID], "item 1 is a message, of which `turns_of` makes pairs"),
        ([("a", "b"), {"user": "a", "bot": "b"}], "item 2 is a message"),
        (["你好", "嗨呀"], "item 1 is str '你好'"),
        ([b"ab"], "item 1 is bytes b'ab'"),
        ([("a", "b", "c")], "item 1 has 3 parts"),
        ([[1, 2, 3], [4]], "item 1 has 3 parts"),
        ([None], "item 1 is None"),
        ("ab", "got str 'ab'"),
        ({"a": "b"}, "got dict {'a': 'b'}"),
        (iter([("a", "b")]), "got list_iterator"),
        (3, "got int 3"),
    ],
)
def test_histories_that_are_none(history, problem):
    with pytest.raises(
        ValueError, match=r"^history must be pairs \(query, reply\) of text"
    ) as caught:
        prompt(history=history)
    assert problem in str(caught.value)


def test_messages_are_a_history():
    call = {"id": "1", "function": {"name": "weather", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "1", "content": "dry"}
    brief = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert chat.turns_of([ASKED, SAID], "S") == ("S", [("My name is Ann.", "Hello Ann.")])
    assert chat.turns_of([brief], "S") == ("Be brief.", [])
    asking = {"role": "assistant", "tool_calls": [call]}
    system, pairs = chat.turns_of([brief, ASKED, asking, result, SAID], "S")
    assert system == "Be brief." and pairs[0][1].endswith("Observation: dry\nHello Ann.")
    assert chat.turns_of([("a", "b")], "S") == ("S", [("a", "b")])
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert chat.with_turn([ASKED, SAID], "q", reply="r") == [ASKED, SAID, *turn]
    assert chat.with_turn(None, "q", reply="r") == [("q", "r")]


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([{"user": "a", "bot": "b"}], "message 1 has role None: allowed are system, user,"),
        ([ASKED], "a reply is the last"),
        ([ASKED, ASKED, SAID], "users and assistants take turns"),
        ([ASKED, SAID, {"role": "system", "content": "x"}], "message 3 has role 'system'"),
        ([ASKED, ("a", "b")], "message 2 is no object with role and content: tuple"),
        ([ASKED, SAID | {"content": 3}], "message 2 has no text in 'content', but int 3"),
    ],
)
def test_messages_that_are_no_history(history, problem):
    with pytest.raises(ValueError, match=r"^history must be messages") as caught:
        chat.turns_of(history, "S")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "work",
    [TINY.decode, TextStream(TINY).push, lambda ids: chat.decode_reply(TINY, ids)],
)
def test_ids_are_whole_numbers(work):
    for right in ([97], np.array([97]), (97,), iter([97]), np.array([97], np.uint8)):
        assert work(right) == "a"
    wrong = ["97", b"a", [97.0], [None], ["97"], 97, None, np.array([97.0]), [[97]]]
    for ids in (*wrong, [True], np.array([True]), {97}, {97: 1}, memoryview(b"a")):
        with pytest.raises(ValueError, match=r"^ids must be whole numbers \(token ids\), got"):
            work(ids)
    for ids in ([97, -1], [10**9], [10**30], np.array([1024])):  # 1024: beyond all padding
        with pytest.raises(ValueError, match=r"^ids: token id .* is out of range: from 0"):
            work(ids)


def test_what_stands_in_padding_does_not_matter():
    tokens, lengths = inputs.rows([[-100, 5], [7, 8]], [[0, 1], [1, 1]], vocab_size=300)
    assert tokens.tolist() == [[0, 5], [7, 8]] and lengths.tolist() == [1, 2]


@pytest.mark.parametrize("stop", ["Human:", ["Human:"], [b"ab"], [[1.5]], [[True]], 3, [3]])
def test_stops_are_ids(stop):
    with pytest.raises(ValueError, match="stop must be"):
        chat.decode_reply(TINY, [97], stop=stop)
    with pytest.raises(ValueError, match="stop must be"):
        next(chat.until_stop([[97]], stop))
    if stop != [3]:
        with pytest.raises(ValueError, match=r"^stop "):
            inputs.stops(stop, 300)
    with pytest.raises(ValueError, match=r"^stop "):
        inputs.stops(b"ab", 300)


@pytest.mark.parametrize(
    ("text", "stops", "kept", "matched"),
    [
        ("Count: 1 2 3 STOP 6 7", ["STOP"], "Count: 1 2 3 ", "STOP"),
        ("STOP at once", ["STOP"], "", "STOP"),
        ("ends with half ST", ["STOP"], "ends with half ST", None),
        ("The END of the END.", ["\n\n", "END"], "The ", "END"),
        ("STSTOP", ["STOP"], "ST", "STOP"),
        ("abcd", ["abcd", "bc"], "a", "bc"),  # complete first
        ("abcd", ["d", "bcd", "cd"], "a", "bcd"),
        ("a👍🏽b", "👍🏽", "a", "👍🏽"),
        ("as it is", [], "as it is", None),
    ],
)
def test_text_until_a_stop_in_whatever_pieces(text, stops, kept, matched):
    for size in range(1, len(text) + 1):
        ends = chat.StopText(stops)
        shown = [ends.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join([*shown, ends.flush()]) == kept and ends.matched == matched
    ends = chat.StopText(["STOP"])
    assert [ends.push(x) for x in ("1 S", "T", "R", "STOP", "2")] == ["1 ", "", "STR", "", ""]


@pytest.mark.parametrize("stop", [[""], "", [b"a"], b"a", [3], 3, None, {"a": 1}, ["a\ud83d"]])
def test_stops_are_texts(stop):
    with pytest.raises(ValueError, match=r"(^|each )stop "):
        chat.StopText(stop)


def test_ids_until_a_stop_in_whatever_pieces():
    for size in (1, 2, 9):
        ends = chat.StopIds([(3, 4), (4,), (9, 9)])
        ids = [1, 9, 2, 3, 4, 5]
        shown = [ends.push(ids[at : at + size]) for at in range(0, len(ids), size)]
        assert sum(shown, ends.flush()) == [1, 9, 2] and ends.matched == (3, 4)


def test_other_arguments_beside_texts():
    for names in (None, 3, [None], [["<|im_end|>"]], b"all"):
        with pytest.raises(ValueError, match="special tokens"):
            TINY.encode("a", allowed_special=names)  # pyright: ignore
    for work in (lambda: TINY.decode([], "nope"), lambda: TextStream(TINY, None)):  # pyright: ignore
        with pytest.raises(ValueError, match="allowed are replace, ignore, strict"):
            work()
    for window in (None, "9", float("nan"), -1, True):
        with pytest.raises(ValueError, match=r"^max_window_size .*: must be a number"):
            prompt(max_window_size=window)
    assert prompt(max_window_size=np.int64(9)) == prompt(max_window_size=9.0)
    for tokenizer in (None, "qwen.tiktoken"):
        for work in (
            lambda x: TextStream(x),
            lambda x: chat.make_context(x, "q"),
            lambda x: data.sft_example(x, TALK, "", None),
        ):
            with pytest.raises(ValueError, match=r"^tokenizer .*: must be a Tokenizer"):
                work(tokenizer)
    for length in ("5", 5.0, True, 0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"^max_len .*: must be a whole number of at least 1"):
            data.sft_example(TINY, TALK, "", length)  # pyright: ignore
    assert len(data.sft_example(TINY, TALK, "", np.int16(5))[0]) == 5  # pyright: ignore
    for messages in (None, 3, "hi", ASKED):
        with pytest.raises(ValueError, match=r"^messages must be a list of objects, got"):
            tools.turns(messages)  # pyright: ignore
    for talk in (None, "hi", TALK[0]):
        with pytest.raises(ValueError, match=r"^conversations must be a list of turns, got"):
            data.sft_example(TINY, talk, "", None)  # pyright: ignore
    for words in (["a"], "a", {"xyz": 0}, {"xyz": "3"}, {"xyz": True}):
        with pytest.raises(ValueError, match=r"^(words must be|the frequency of)"):
            expand_vocab.learn_tokens(TINY, words)  # pyright: ignore
    with pytest.raises(ValueError, match=r"^words must be a list"):
        expand_vocab.splittable("whale")
    with pytest.raises(ValueError, match=r"^tokens must be bytes, got str 'a'"):
        expand_vocab.write_tokens("/no/such/folder", ["a"], start_id=1)  # pyright: ignore
    with pytest.raises(ValueError, match=r"^start_id '1': must be a whole number"):
        expand_vocab.write_tokens("/no/such/folder", [b"a"], start_id="1")  # pyright: ignore
    with pytest.raises(ValueError, match=r"^size '300': must be a whole number"):
        learning.learn(["a"], "300")  # pyright: ignore
    with pytest.raises(ValueError, match=r"^sources must be a list of paths, got str"):
        records.files("a.txt")
    for path in (None, b"a", 3):
        with pytest.raises(ValueError, match=r"^a path must be a str or a Path, got"):
            Tokenizer.from_file(path)  # pyright: ignore


@pytest.mark.parametrize("content", [None, 3, ["x"], [{"type": "image_url"}], {"text": "x"}])
def test_contents_of_records(content):
    with pytest.raises(ValueError, match="message 1 has "):
        data.chat_example(
            TINY, {"messages": [ASKED | {"content": content}, SAID]}, system="", max_len=None
        )
    with pytest.raises(ValueError, match=r"^there is no text in 'text', but "):
        data.text_example(TINY, {"text": content})
    with pytest.raises(ValueError, match=r"^no key 'text', but 'body': name the one with --field"):
        data.text_example(TINY, {"body": content})


READERS = {
    "prompt.txt": lambda path: texts.read(path),
    "a.txt": lambda path: next(records.read(path)).value,
    "a.txt.gz": lambda path: next(records.read(path)).value,
}


def stored(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name in ("prompt.txt", "a.txt", "a.txt.gz"):
        path = stored(tmp_path, name, codecs.BOM_UTF8 + b"The whale\r\n\xef\xbb\xbfno mark")
        assert READERS[name](path) == "The whale\r\n\ufeffno mark"
    assert read_json(stored(tmp_path, "c.json", codecs.BOM_UTF8 + b'{"a": 1}\r\n')) == {"a": 1}
    for name, content in (("b.jsonl", b'{"text": "a"}\r\n'), ("b.json", b'[{"text": "a"}]')):
        (record,) = records.read(stored(tmp_path, name, codecs.BOM_UTF8 + content))
        assert record.value == {"text": "a"}
    assert [*records.read(stored(tmp_path, "c.jsonl", codecs.BOM_UTF8 + b"\n"))] == []
    vocabulary = write_tiny_vocab(tmp_path / "qwen.tiktoken")
    plain = vocabulary.read_bytes()
    marked = stored(tmp_path, "m", codecs.BOM_UTF8 + plain.replace(b"\n", b"\r\n"))
    assert Tokenizer.from_file(marked).ranks == Tokenizer.from_file(vocabulary).ranks
    words = stored(tmp_path, "w.txt", codecs.BOM_UTF8 + b"whale\t3\r\n")
    assert expand_vocab.read_words(words) == {"whale": 3}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(tmp_path, encoding):
    """By the mark that editors write before them."""
    mark = b"" if encoding in ("utf-16", "utf-32") else "\ufeff".encode(encoding)
    content = mark + '[{"text": "a"}]'.encode(encoding)
    said = f"it is {encoding[:6].upper()}: save it as UTF-8"
    for name in ("a.txt", "a.txt.gz", "a.json", "a.jsonl"):
        (record,) = records.read(stored(tmp_path, name, content))
        assert record.value is None and record.problem == said
    path = stored(tmp_path, "x", content)
    for work in (texts.read, read_json, expand_vocab.read_words, Tokenizer.from_file):
        with pytest.raises(ValueError, match=rf"{path}.*{said}$"):
            work(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"one\ntwo \xbe\xa8", "0xbe at byte 8, in line 2: save it as UTF-8"),
        (codecs.BOM_UTF8 + b"a\xe9", "0xe9 at byte 4, in line 1"),
        (b"a\nb\0c", "a zero at byte 3, in line 2: it is no text"),
        (b"a\0b\0", "a zero at byte 1, in line 1"),
    ],
)
def test_bytes_that_are_no_text_are_found(tmp_path, content, problem):
    path = stored(tmp_path, "a.txt", content)
    for work in (texts.read, read_json, expand_vocab.read_words):
        with pytest.raises(ValueError) as caught:
            work(path)
        assert str(path) in str(caught.value) and problem in str(caught.value)
    *_, record = records.read(path)
    line = content.count(b"\n") + 1
    assert record.where == f"{path} line {line}"
    assert record.problem in ("no UTF-8", "a zero byte: it is no text, or in another encoding")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": ' + b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"{", "is not valid JSON: "),
        (b"", "is not valid JSON: "),
        (b"[]", "is not a JSON object"),
    ],
)
def test_json_that_is_none(tmp_path, content, problem):
    path = stored(tmp_path, "config.json", content)
    with pytest.raises(ValueError, match=f"^{path} .*{problem}"):
        read_json(path)


def test_names_of_files_may_hold_any_bytes(tmp_path):
    name = os.fsdecode(b"\xbe\xa8.json")
    write_json(tmp_path / name, {"file": name})
    assert read_json(tmp_path / name) == {"file": name}
    with pytest.raises(ValueError, match="its name is not UTF-8, which TensorStore cannot open"):
        paths.kvstore(tmp_path / name)


def opened(call: ast.Call) -> bool:
    """Whether a call opens a text file."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name == "open" and owner in ("os", "tensorstore", "gzip", "webbrowser"):
        return False
    modes = [x.value for x in call.args if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    binary = any("b" in mode for mode in modes)
    return name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary)


def test_every_text_file_is_opened_as_utf8():
    """Python would take the encoding of the locale."""
    found = []
    parts = [ROOT / name for name in ("qwen_jax", "convert", "train")]
    for file in (file for part in parts for file in part.rglob("*.py")):
        source = file.read_text("utf-8")
        if not re.search(r"open\(|_text\(", source):
            continue
        calls = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Call)]
        for call in filter(opened, calls):
            if "encoding" not in {keyword.arg for keyword in call.keywords}:
                found.append(f"{file.name}:{call.lineno}")
    assert found == []


def test_json_that_holds_half_a_character(tmp_path):
    path = stored(tmp_path, "a.jsonl", json.dumps({"text": "a\ud83d"}).encode())
    (record,) = records.read(path)
    with pytest.raises(ValueError, match="the text in 'text' holds half a character"):
        data.text_example(TINY, record.value)
