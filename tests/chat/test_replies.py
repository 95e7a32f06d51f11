"""Replies as messages: the original's figures, and the same from every cut of the text."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_jax.chat import (
    ArgumentsDelta,
    CallBegins,
    ChatML,
    ReplyEnds,
    StopText,
    TextDelta,
    parse_reply,
)
from qwen_jax.chat.formats import Begins, ReplyEvent
from qwen_jax.chat.markers import NEAR
from qwen_jax.chat.replies import UNMARKED, PlainParser, ReactParser, parse
from qwen_jax.chat.tokenizer import Tokenizer
from tests.support.golden_figures import GOLDEN
from tests.support.vocabulary import tiny_ranks

ROWS = json.loads((GOLDEN / "serve" / "replies.json").read_text("utf-8"))
STREAMS = json.loads((GOLDEN / "serve" / "streams.json").read_text("utf-8"))
MARKERS = ("Thought:", "Action:", "Action Input:", "Final Answer:", "Observation:")
CALL = 'Thought: t\nAction: a\nAction Input: {"q": 1}'
FENCED = "```\nAction: a\nAction Input: {}\n```"


def message(row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    call = row["function_call"]
    return row["content"].strip(), [(call["name"], call["arguments"])] if call else []


def read(text: str) -> tuple[str, list[tuple[str, str]]]:
    content, calls = parse_reply(text)
    assert content is not None or calls
    return content or "", [*map(tuple, calls)]


def stream(pieces: Any, begins: Begins = "reply") -> tuple[list[ReplyEvent], ReactParser]:
    """The events of a text in pieces, with deltas that follow each other joined."""
    parser, events = ReactParser(begins), []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.flush()
    assert parser.over and isinstance(events[-1], ReplyEnds)
    joined: list[ReplyEvent] = []
    for kind, group in itertools.groupby(events, key=type):
        if kind is TextDelta:
            joined.append(TextDelta("".join(event.text for event in group)))
        elif kind is ArgumentsDelta:
            joined.append(ArgumentsDelta(0, "".join(event.text for event in group)))
        else:
            joined += group
    return joined, parser


def test_replies_match_the_original():
    for row in ROWS:
        expected = [message(row[key]) for key in ("correct", "arguable") if key in row]
        if "correct" not in row:
            expected.append(message(row))
            assert read(row["trimmed"]) in expected
        assert read(row["output"]) in expected
        cut = StopText("Observation:")
        assert cut.push(row["output"]) + cut.flush() == row["trimmed"]
        reason = "tool_calls" if parse_reply(row["output"])[1] else "stop"
        assert parse(row["output"]).finish_reason == reason


def test_streams_match_the_original():
    for row in STREAMS:
        texts = ["", *row["texts"]]
        pieces = [text[len(before) :] for before, text in itertools.pairwise(texts)]
        stops = StopText(row["stop_words"] or ())
        shown = [*map(stops.push, pieces), stops.flush()]
        assert "".join(shown) == row.get("correct", row.get("joined", ""))
        if not row["stop_words"] and "chunks" in row:
            parser = PlainParser()
            events = [*itertools.chain(*map(parser.push, shown)), *parser.flush()]
            deltas = [chunk["choices"][0]["delta"] for chunk in row["chunks"][1:-2]]
            assert events == [*(TextDelta(x["content"]) for x in deltas), ReplyEnds("stop")]


OTHERS = (
    "\n", "\n", "\n", " ", "\r", "\u3000", "a b", "search", "\n\n", "x" * 150, "y" * NEAR,
    "{", "}", "[", '"', ",", ":", "\\", '\\"', '{"q": "x"}', "```", "```py\n", "```\n",
    "Obs", "O", "Action", "Act", "Final", CALL, FENCED,
)  # fmt: skip
PARTS = st.sampled_from((*MARKERS, *OTHERS))


@given(st.lists(PARTS, max_size=25), st.randoms(use_true_random=False), st.data())
@example([CALL, "\n", "Observation:", "x"], None, None)
@example(["x" * (UNMARKED - 1), "\n", "Final Answer:", "a"], None, None)
@example([CALL, "\n```\n", "Thought:", "y" * NEAR, "```\n"], None, None)
@example(["x" * UNMARKED, "\n", "Final Answer:", "a"], None, None)
def test_every_cut_gives_the_same_events(parts, random, data):
    text = "".join(parts)
    begins = data.draw(st.sampled_from(("reply", "thought", "answer"))) if data else "reply"
    whole, parser = stream([text], begins)
    cuts = [list(text), parts]
    if random is not None:
        places = sorted(random.sample(range(len(text) + 1), min(len(text), 5)))
        cuts.append([text[i:j] for i, j in itertools.pairwise([0, *places, len(text)])])
    for pieces in cuts:
        assert stream(pieces, begins)[0] == whole
    reply = parse(text, begins)
    said = "".join(event.text for event in whole if isinstance(event, TextDelta))
    if parser.restart:
        assert said.endswith(reply.content or "")
    else:
        assert (reply.content or "") == said
    named = [event.name for event in whole if isinstance(event, CallBegins)]
    given_ = "".join(event.text for event in whole if isinstance(event, ArgumentsDelta))
    assert [*map(tuple, reply.calls)] == [(name, given_) for name in named]
    assert whole[-1] == ReplyEnds(reply.finish_reason)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Thought: I know.\nFinal Answer: It is", ["", "It", " is"]),
        ("Thought: k\nFinal Answer: a\nObserv", ["a"]),
        ("One.\n\nTwo. ", ["One.\n\nTwo."]),
        ("x" * (UNMARKED + 1), ["x" * (UNMARKED + 1)]),
        ("Thought: two\n\nparagraphs", []),
        ("One.\n\nTwo.\nAction", ["One.\n\nTwo."]),
        ("One.\n\nTwo.\nAction: no call\nmore", ["One.\n\nTwo."]),
    ],
)
def test_what_is_shown_before_the_reply_ends(text, shown):
    """An answer as it comes, and never what may be a thought or half a marker."""
    parser = ReactParser()
    events = list(itertools.chain(*map(parser.push, text)))
    assert all(isinstance(event, TextDelta) for event in events)
    assert "".join(event.text for event in events) == "".join(shown)


def test_a_call_is_told_as_it_comes():
    parser = ReactParser()
    assert parser.push("Thought: t\nAction: search\nAction Input") == []
    assert parser.push(":") == [TextDelta("t"), CallBegins(0, "search")]
    assert parser.push(' {"q"') == [ArgumentsDelta(0, '{"q"')]
    assert parser.push(': "Observation: x') == [ArgumentsDelta(0, ': "Observation: x')]
    assert parser.push('"}\n') == [ArgumentsDelta(0, '"}')]
    assert parser.push("Observation") == [] and not parser.over
    assert parser.push(": made up") == [ReplyEnds("tool_calls")] and parser.over
    assert parser.push("\nFinal Answer: x") == [] and parser.flush() == []


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # A fence holds no markers, wherever it is, unless it is never closed.
        (f"Like so:\n{FENCED}", f"Like so:\n{FENCED}", []),
        (f"Like so:\n{FENCED}\nAction: b\nAction Input: 1", f"Like so:\n{FENCED}", [("b", "1")]),
        ("Final Answer: ```\nObservation: x\n```\ny", "```\nObservation: x\n```\ny", []),
        ("Action: a\nAction Input: ```py\n1+1```\nObservation: 2", "", [("a", "```py\n1+1```")]),
        ("Action: a\nAction Input: ```py\n1\nObservation: 2", "", [("a", "```py\n1")]),
        # Nor does a string of JSON, unless it is not one.
        ('Action: a\nAction Input: "Observation: x"', "", [("a", '"Observation: x"')]),
        ('Action: a\nAction Input: {"q": "x\nObservation: "y" z', "", [("a", '{"q": "x')]),
        ('Action: a\nAction Input: {"q": "x\nThought: ' + "y" * NEAR, "", [("a", '{"q": "x')]),
        ('Action: a\nAction Input: {"q": "x\nAction: y"}', "", [("a", '{"q": "x\nAction: y"}')]),
        ('Action: a\nAction Input: {} "Observation: x"', "", [("a", '{} "')]),
        ('Action: a\nAction Input: say "Observation: x"', "", [("a", 'say "')]),
        ('Action: a\nAction Input: ["\\"Observation: x"]', "", [("a", '["\\"Observation: x"]')]),
        ('Action: a\nAction Input: ["\n```\n"]\nThought: t\n```\n', "", [("a", '["\n```\n"]')]),
        # Names, and what stands where one should be.
        ("Action: a\n\nAction Input: 1", "", [("a", "1")]),
        ("Action:\na\nAction Input: 1", "", [("a", "1")]),
        ("Action: a\nmore\nAction Input: 1", "", [("a", "1")]),
        ("Action:\nAction Input: 1", "Action:\nAction Input: 1", []),
        ("Action:\nAction Input: 1\nFinal Answer: 2", "2", []),
        ("Action: a\nThought: t\nAction Input: 1", "Action: a\nThought: t\nAction Input: 1", []),
        # One call, as Qwen was trained to wait for its result.
        (f"{CALL}\nAction: b\nAction Input: 2", "t", [("a", '{"q": 1}')]),
        # An answer ends the reply, and of several the last is meant.
        ("Final Answer: a\nAction: b\nAction Input: 1", "a\nAction: b\nAction Input: 1", []),
        ("Thought: k\nFinal Answer: a\nThought: l\nFinal Answer: b", "b", []),
        ("One.\n\nTwo.\nFinal Answer: b", "b", []),
        ("Final Answer: \nFinal Answer: b", "b", []),
        ("Final Answer: Final Answer: b", "Final Answer: b", []),
        (" Thought: t\nAction: a\nAction Input: 1", "t", [("a", "1")]),
        ("Question: q\nThought: t\nAction: a\nAction Input: 1", "t", [("a", "1")]),
    ],
)  # fmt: skip
def test_what_is_in_a_reply(text, content, calls):
    assert read(text) == (content, calls)
    assert stream(text)[0] == stream([text])[0]


def test_a_fence_that_is_not_closed_does_not_hold_a_reply_forever():
    parser = ReactParser()
    parser.push("Action: a\nAction Input: ```py\n1\nObservation: ")
    assert parser.push("y" * (NEAR - 20)) == [] and not parser.over
    assert parser.push("y" * 20) == [ReplyEnds("tool_calls")] and parser.over
    parser = ReactParser()
    parser.push("```\nThought: " + "y" * NEAR)
    assert parser.push("\nFinal Answer: x") == [TextDelta("x")]


def test_what_the_text_begins_with():
    """It may continue a thought or an answer, in which a call does not count."""
    text = " I see.\nFinal Answer: x"
    assert parse(text, "thought").content == "x"
    assert parse(" only a thought", "thought").content == "only a thought"
    assert parse(" world ", "answer").content == " world"
    assert parse(f" so:\n{CALL}", "answer").content == f" so:\n{CALL}"
    assert parse(f" so:\n{CALL} ", "plain").content == f" so:\n{CALL} "
    assert parse(f" I must.\n{CALL}", "thought").content == f"I must.\n{CALL}".split("\nAction")[0]


def test_a_format_gives_the_parser_of_a_prompt():
    chat = ChatML(Tokenizer(tiny_ranks()))
    for begins, events in (
        ("plain", [TextDelta(" x")]),
        ("answer", [TextDelta(" x")]),
        ("reply", []),
    ):
        assert chat.parser(begins).push(" x") == events
    assert chat.parse(CALL, "reply") == parse(CALL)
