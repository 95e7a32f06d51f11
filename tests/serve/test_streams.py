"""Streams: their chunks, texts that arrive in any pieces, errors in the middle."""

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_jax.engine.settings import Choice, Ended, Started
from qwen_jax.serve.drafts import Draft
from tests.support.golden_figures import GOLDEN
from tests.support.served_app import HELLO, TOKENIZER, Served, opened, payloads, until

CHAT = "/v1/chat/completions"
GOLDEN_STREAMS = json.loads((GOLDEN / "serve/streams.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    with opened() as found:
        yield found


def content(chunks: list[dict[str, Any]]) -> str:
    """The joined text of a chat's stream of one choice."""
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_a_stream_has_a_role_then_text_then_how_it_ended(one: Served) -> None:
    one.says = "Hello 你好"
    first, *middle, last = one.stream(model="tiny")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content(middle) == "Hello 你好"
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    for chunk in (first, *middle, last):
        assert chunk["object"] == "chat.completion.chunk" and "usage" not in chunk
        same = ("id", "created", "model")
        assert {name: chunk[name] for name in same} == {name: first[name] for name in same}
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *middle))


def test_usage_comes_only_when_asked_for_in_a_chunk_without_choices(one: Served) -> None:
    one.says = "abc"
    whole = one.chat()["usage"]
    *chunks, last = one.stream(stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == whole
    assert all(chunk["usage"] is None for chunk in chunks)
    running = one.stream(stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert all(chunk["usage"]["prompt_tokens"] == whole["prompt_tokens"] for chunk in running)


def test_choices_of_a_stream_are_those_of_the_whole_answer(one: Served) -> None:
    one.says = "abc 你"
    chunks = one.stream("/v1/completions", prompt=["a", "b"], n=2, max_tokens=9, logprobs=1)
    whole = one.complete(prompt=["a", "b"], n=2, max_tokens=9, logprobs=1)["choices"]
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        for name, told in choice["logprobs"].items():
            parts = [part["logprobs"][name] for part in mine if part["logprobs"]]
            assert [x for part in parts for x in part] == told


def test_a_chats_logprobs_come_with_its_text(one: Served) -> None:
    one.says = "ab 你"
    whole = one.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    chunks = [chunk["choices"][0] for chunk in one.stream(logprobs=True)]
    found = [x for chunk in chunks if chunk["logprobs"] for x in chunk["logprobs"]["content"]]
    assert found == whole
    one.says = [97, 98]
    chunks = [chunk["choices"][0] for chunk in one.stream(return_token_ids=True)]
    found = [i for chunk in chunks for i in chunk.get("token_ids", ())]
    assert found == one.chat(return_token_ids=True)["choices"][0]["token_ids"]


@pytest.mark.parametrize("row", [row for row in GOLDEN_STREAMS if row["texts"]])
def test_the_originals_streams_are_reproduced(one: Served, row: dict[str, Any]) -> None:
    """Their text, but where the original lets a stop through; chunks may be cut elsewhere."""
    one.says = row["texts"][-1]
    found = one.stream(stop=row["stop"])
    assert content(found) == row.get("correct", row["joined"])
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def pieces(draft: Draft, ids: list[int], cuts: list[int]) -> list[str]:
    """The texts of a draft that gets ids in parts, and then an end."""
    events = [*(Choice(i) for i in ids), Ended("length")]
    bounds = [0, *sorted({min(cut, len(events)) for cut in cuts}), len(events)]
    return [draft.add(events[a:b]).text for a, b in itertools.pairwise(bounds)]


@given(
    st.lists(st.one_of(st.integers(0, 260), st.integers(0x80, 0xF4)), max_size=30),
    st.lists(st.integers(0, 30)),
)
@example([0xE4, 0xBD, 0xA0], [1, 2])
@example(TOKENIZER.encode("👨‍👩‍👧"), list(range(30)))
def test_pieces_of_text_are_the_whole_however_tokens_arrive(
    ids: list[int], cuts: list[int]
) -> None:
    found = pieces(Draft(TOKENIZER), ids, cuts)
    assert "".join(found) == TOKENIZER.decode(ids)
    valid = TOKENIZER.decode_bytes(ids).decode("utf-8", "ignore")
    if TOKENIZER.decode(ids) == valid:
        assert not any("\ufffd" in piece for piece in found)


@given(st.text("ab你 ", max_size=20), st.lists(st.text("ab你 ", min_size=1), max_size=3), st.data())
def test_stops_cut_the_same_text_however_it_arrives(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    ids = TOKENIZER.encode(text)
    cuts = data.draw(st.lists(st.integers(0, 30)))
    draft = Draft(TOKENIZER, stops=stops)
    found = "".join(pieces(draft, ids, cuts))
    whole = Draft(TOKENIZER, stops=stops)
    assert found == "".join(pieces(whole, ids, []))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert (draft.stop is not None) == bool(ends)
    assert draft.reason == ("stop" if ends else "length")
    if ends:
        assert text.startswith(found + str(draft.stop))
        assert len(found + str(draft.stop)) == min(ends)
    else:
        assert found == text


@given(st.text("a你😀", max_size=9), st.sampled_from(["", "你", "😀a"]), st.integers(1, 3))
def test_tokens_are_told_with_the_text_that_they_begin(text: str, stop: str, size: int) -> None:
    """The tokens of a chat are those of its content; each comes with text that it is part of."""
    events = [*(Choice(i) for i in TOKENIZER.encode(text)), Ended("length")]
    draft = Draft(TOKENIZER, stops=[stop] if stop else [])
    found = [draft.add(events[at : at + size]) for at in range(0, len(events), size)]
    shown = "".join(piece.text for piece in found)
    tokens = [token.choice.id for piece in found for token in piece.tokens]
    assert TOKENIZER.decode(tokens) == shown
    for piece in found:
        assert piece.text or not piece.tokens


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event() -> None:
    with opened("abcdef", stepwise=True) as one:
        engine = one.engine

        def fail() -> None:
            until(lambda: engine.submitted)
            engine.step()
            engine.fail("the device is gone")

        thread = threading.Thread(target=fail)
        thread.start()
        answer = one.client.post(CHAT, json={"messages": HELLO, "stream": True})
        thread.join()
        *_, last = payloads(answer.text)
        assert last["error"]["code"] == 500 and "the device is gone" in last["error"]["message"]
        status, error = one.refused(CHAT, messages=HELLO)
        assert status == 500 and "the device is gone" in error["message"]
        assert one.client.get("/health").status_code == 503
        assert one.served.live == one.served.answering == 0


def test_no_chunk_comes_before_the_first_token() -> None:
    """A row alone is no answer: clients take the time of the first chunk for the token's."""
    with opened("abc", stepwise=True) as one:

        def admit() -> None:
            until(lambda: one.engine._live)
            one.engine._live[0].listener(Started(0))
            desk = one.served.desk
            assert desk is not None
            until(lambda: not desk.waiting)
            until(lambda: not any(job.events for group in desk.groups for job in group.jobs))
            one.engine.fail("the device is gone")

        thread = threading.Thread(target=admit)
        thread.start()
        answer = one.client.post(CHAT, json={"messages": HELLO, "stream": True})
        thread.join()
        assert [list(chunk) for chunk in payloads(answer.text)] == [["error"]]


def test_an_engine_that_dies_without_a_word_leaves_no_request_waiting() -> None:
    with opened("abc", stepwise=True) as one:
        engine = one.engine

        def die() -> None:
            until(lambda: engine.submitted)
            engine._failure = "it is silent"

        thread = threading.Thread(target=die)
        thread.start()
        status, error = one.refused(CHAT, messages=HELLO)
        thread.join()
        assert status == 500 and "it is silent" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_mistake_of_the_server_is_an_error_and_its_traceback_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    monkeypatch.setattr(Draft, "add", lambda *_: 1 / 0)
    with opened("abc") as one:
        answer = one.client.post(CHAT, json={"messages": HELLO, "stream": stream})
        error = (payloads(answer.text)[-1] if stream else answer.json())["error"]
        assert (answer.status_code, error["code"]) == (200 if stream else 500, 500)
        assert "log" in error["message"] and "Traceback" in caplog.text
        assert "ZeroDivisionError" in caplog.text and "ZeroDivisionError" not in answer.text
        assert one.served.live == 0
