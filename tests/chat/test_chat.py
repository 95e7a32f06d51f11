import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.chat import decode_reply, make_context, stop_sequences, turns_of
from qwen_jax.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.vocabulary import qwen_tokenizer, tiny_ranks

# Figures made by running the original prompt code with the published vocabulary.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat_prompts.json").read_text("utf-8"))


@pytest.fixture
def tiny() -> Tokenizer:
    return Tokenizer(tiny_ranks())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: ascii(case["query"][:20]))
def test_prompts_match_the_original(case):
    arguments = {name: value for name, value in case.items() if name not in ("text", "ids")}
    text, ids = make_context(qwen_tokenizer(), **arguments)
    assert text == case["text"]
    assert ids == case["ids"]


def test_history_is_kept_strictly_below_the_window(tiny):
    history = [("first", "1"), ("second", "2"), ("third", "3")]

    def prompt(window: int) -> str:
        return make_context(tiny, "q", history, "S", max_window_size=window)[0]

    head = len(make_context(tiny, "q", (), "S")[1]) - len(make_context(tiny, "q")[1])
    head += len("system\n") + 2  # im_start, im_end
    turn = len("\nuser\nthird\nassistant\n3") + 4
    assert "third" not in prompt(head + turn)
    assert "third" in prompt(head + turn + 1) and "second" not in prompt(head + turn + 1)
    assert prompt(0).count("<|im_start|>user") == 1  # the query is never dropped
    assert prompt(10_000).count("<|im_start|>user") == 4


def test_the_first_turn_that_does_not_fit_ends_the_history(tiny):
    history = [("tiny", "x"), ("long " * 100, "x"), ("new", "x")]
    text, _ = make_context(tiny, "q", history, max_window_size=200)
    assert "new" in text and "long" not in text and "tiny" not in text


def test_a_history_with_more_than_is_read_is_refused():
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert turns_of([message | {"refusal": None} for message in said], "")[1] == [("x", "y")]
    with pytest.raises(ValueError, match=r"history must be .*'reasoning_content' 'z', which"):
        turns_of([said[0], said[1] | {"reasoning_content": "z"}], "")


def test_no_history_may_be_none(tiny):
    assert make_context(tiny, "q", None) == make_context(tiny, "q", [])


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS[:4], "\n", "user", "<|", "x"]), max_size=8))
def test_no_text_of_the_caller_becomes_a_control_token(words):
    tokenizer = qwen_tokenizer()
    text = "".join(words)
    _, ids = make_context(tokenizer, text, [(text, text)], text)
    control = [i for i in ids if i >= tokenizer.eod_id]
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    assert control == [start, end] * 4 + [start]
    assert all(i < tokenizer.eod_id for i in make_context(tokenizer, text, chat_format="raw")[1])


def test_content_does_not_merge_with_the_newline_before_it():
    tokenizer = qwen_tokenizer()
    _, ids = make_context(tokenizer, "\nx")
    user = tokenizer.encode("user")[0]
    assert ids[ids.index(user) + 1 : ids.index(user) + 4] == [198, 198, tokenizer.encode("x")[0]]


def test_stop_sequences():
    tokenizer = qwen_tokenizer()
    assert stop_sequences(tokenizer, "chatml") == ((151645,), (151644,))
    human = tuple(tokenizer.encode("Human:"))
    assert len(human) > 1
    assert stop_sequences(tokenizer, "raw") == (human, (151643,))


@pytest.mark.parametrize("end", ["eod_id", "im_start_id", "im_end_id"])
def test_reply_is_cut_at_the_first_control_token(tiny, end):
    ids = [*b" hello \n", getattr(tiny, end), *b"more", tiny.im_end_id]
    assert decode_reply(tiny, ids) == "hello"


def test_reply_without_an_end_is_whole(tiny):
    assert decode_reply(tiny, list(b"\nabc <|im_end|> \n")) == "abc <|im_end|>"  # spelled out
    assert decode_reply(tiny, []) == ""
    assert decode_reply(tiny, [*b"abc", 0xE4]) == "abc\ufffd"
    assert decode_reply(tiny, [*b"abc", 0xE4], errors="ignore") == "abc"


def test_raw_reply_is_cut_at_the_end_of_the_text_only(tiny):
    ids = [*b" a", tiny.im_end_id, *b"b ", tiny.eod_id, *b"c"]
    assert decode_reply(tiny, ids, chat_format="raw") == "a<|im_end|>b"


def test_reply_is_cut_at_stop_sequences_given(tiny):
    ids = list(b"Hum. Human: yes. Human:")
    assert decode_reply(tiny, ids, chat_format="raw") == "Hum. Human: yes. Human:"
    assert decode_reply(tiny, ids, chat_format="raw", stop=stop_sequences(tiny, "raw")) == "Hum."
    assert decode_reply(tiny, list(b"abc"), stop=[[ord("c")], []]) == "ab"


def test_other_formats_are_not_implemented(tiny):
    with pytest.raises(NotImplementedError, match="chat_format"):
        make_context(tiny, "q", chat_format="llama")
    with pytest.raises(NotImplementedError, match="chat_format"):
        stop_sequences(tiny, "llama")
    with pytest.raises(NotImplementedError, match="chat_format"):
        decode_reply(tiny, [], chat_format="llama")
