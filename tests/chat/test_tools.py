"""Messages as turns: calls and results as ReAct text, orders that cannot be."""

import math
from typing import Any

import numpy as np
import pytest

from qwen_jax.chat.tools import instruction, turns

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": 1}'}}
ASKED = {"role": "user", "content": "Is it raining?"}


def test_a_plain_conversation_is_left_as_it_is():
    said = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "\nhi "},
        {"role": "assistant", "content": [{"type": "text", "text": x} for x in ("hel", "lo")]},
    ]
    system, found = turns(said)
    assert system == " Be brief.\n"
    assert [(turn.role, turn.text) for turn in found] == [("user", "\nhi "), ("assistant", "hello")]
    assert turns(said[1:])[0] is None


def test_calls_and_results_are_one_reply():
    said = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "dry\n"},
        {"role": "assistant", "content": "No."},
    ]
    _, (question, reply) = turns(said, [WEATHER])
    assert question.text == f"{instruction([WEATHER])}\n\nQuestion: Is it raining?"
    assert reply.text == (
        'Thought: I can use weather.\nAction: weather\nAction Input: {"place": 1}\n'
        "Observation: dry\nThought: I now know the final answer.\nFinal Answer: No."
    )
    assert [text for text, own in reply.spans if not own] == ["\nObservation: dry"]
    older = {"role": "assistant", "function_call": {"name": "weather", "arguments": {"place": 1}}}
    assert turns([ASKED, older, {"role": "function", "content": "dry"}, said[3]], [WEATHER])[1] == [
        question,
        reply,
    ]


@pytest.mark.parametrize("thought", ["Let me look.", "Thought: Let me look.\n"])
def test_calls_of_one_message_are_made_one_after_the_other(thought):
    """Each with its result, in whatever order these came; what was said is the first thought."""
    calls = [{"id": x, "function": {"name": x, "arguments": {}}} for x in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": x, "content": f"of {x}"} for x in ("b", "a")]
    said = [ASKED, {"role": "assistant", "content": thought, "tool_calls": calls}, *results]
    _, (_, reply) = turns([*said, {"role": "assistant", "content": "Done."}])
    assert reply.text == (
        "Thought: Let me look.\nAction: a\nAction Input: {}\nObservation: of a\n"
        "Thought: I can use b.\nAction: b\nAction Input: {}\nObservation: of b\nDone."
    )
    assert [own for _, own in reply.spans] == [True, False, True, False, True]
    in_order = [{"role": "tool", "tool_call_id": "", "content": f"of {x}"} for x in ("a", "b")]
    by_name = [{"role": "tool", "name": x, "content": f"of {x}"} for x in ("b", "a")]
    for other in (in_order, by_name):
        assert turns([*said[:2], *other])[1][1].text == reply.text.removesuffix("\nDone.")


def test_what_tells_of_tools():
    text = instruction(
        [WEATHER, {"name": "b", "description_for_model": "x", "name_for_human": "B"}]
    )
    assert "weather: Call this tool to interact with the weather API." in text
    assert 'Parameters: {"type": "object", "properties": {"place": {"type": "string"}}}' in text
    assert "b: Call this tool to interact with the B API. What is the B API useful for? x " in text
    assert "should be one of [weather, b]" in text and text.endswith("\n\nBegin!")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tools_are_told_of_before_any_reply(count):
    reply = {"role": "assistant", "content": "No."}
    _, found = turns([ASKED, reply] * count, [WEATHER])
    assert [i for i, turn in enumerate(found) if "Begin!" in turn.text] == [0]


def test_null_is_what_is_not_there():
    """As Parquet has it, where other rows have more."""
    tool = {"name_for_model": None, "name": "b", "description": None, "name_for_human": None}
    tool |= {"parameters": None, "function": {"name": None}}
    assert instruction([tool]) == instruction([{"name": "b"}])
    call = {"function": {"name": "b", "arguments": None}}
    _, (_, reply) = turns([ASKED, {"role": "assistant", "tool_calls": [call]}], [tool])
    assert reply.text.endswith("Action: b\nAction Input: {}")


def test_keys_that_say_nothing():
    said = [ASKED, {"role": "assistant", "content": "No."}]
    nothing = {
        "refusal": None, "reasoning_content": "", "images": [], "audio": {}, "prefix": False,
        "video": {"bytes": None, "path": None}, "tool_calls": [], "id": "x", "timestamp": 5,
    }  # fmt: skip
    assert turns([message | nothing for message in said]) == turns(said)
    hollow = {"id": None, "function": {"name": None, "arguments": None}}
    nothing = {
        "tool_calls": [hollow], "function_call": hollow, "audio": {"data": {"x": None}},
        "images": np.array([None, ""]), "name": math.nan, "parts": np.array([]),
    }  # fmt: skip
    assert turns([message | nothing for message in said]) == turns(said)


def test_a_key_that_is_not_known():
    said = [ASKED, {"role": "assistant", "content": "No."}]
    with pytest.warns(UserWarning, match="messages have 'a_key_of_tomorrow', which is not known"):
        assert turns([message | {"a_key_of_tomorrow": 5} for message in said]) == turns(said)


RESULT = {"role": "tool", "tool_call_id": "1", "content": "dry"}
ANSWER = {"role": "assistant", "content": "No."}


def calling(*calls: Any) -> list[Any]:
    return [ASKED, {"role": "assistant", "tool_calls": list(calls)}]


@pytest.mark.parametrize(
    ("messages", "tools", "problem"),
    [
        (
            [{"role": "bot", "content": "x"}],
            (),
            "message 1 has role 'bot': allowed are system, user",
        ),
        ([{"content": "x"}], (), "message 1 has role None"),
        ([ASKED, {"role": "system", "content": "x"}], (), "message 2 has role 'system'"),
        ([{"role": "assistant", "content": "x"}], (), "message 1 is a reply to nobody"),
        ([ASKED, {"role": "tool", "content": "x"}], (), "message 2 is the result of no call"),
        ([*calling(CALL), RESULT, RESULT], (), "message 4 is the result of no call"),
        ([*calling(CALL), RESULT | {"tool_call_id": "2"}], (), "message 3 is the result of no"),
        ([*calling(CALL), ANSWER, RESULT], (), "message 4 is the result of no call"),
        ([ASKED, ANSWER, RESULT], (), "message 3 is the result of no call"),
        ([ASKED, {"role": "assistant"}], (), "message 2 has no text in 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], (), "message 1 has parts that are no"),
        ([{"role": "user", "content": [{"type": "text"}]}], (), "message 1 has parts that are no"),
        ([{"role": "user", "content": ["x"]}], (), "message 1 has parts that are no"),
        (
            [{"role": "user", "content": [{"type": ["text"]}]}],
            (),
            "message 1 has parts that are no",
        ),
        ([ASKED, "x"], (), "message 2 is no object"),
        ([{"role": ["user"], "content": "x"}], (), r"message 1 has role \['user'\]"),
        ([ASKED], [{"type": "function", "function": {}}], "tool 1 has no name"),
        ([ASKED], [WEATHER, "x"], "tool 2 is no object that holds a function"),
        ([ASKED], [3], "tool 1 is no object that holds a function"),
        ([ASKED], [{"name": "b", "description": {}, "name_for_human": 1}], "tool 1 has a name or"),
        ([ASKED], [{"name": "b", "parameters": {"x": {1}}}], "the parameters of tool 1 cannot be"),
        (calling("x"), (), "call 1 of message 2 is no object"),
        (calling(CALL, {"function": None}), (), "call 2 of message 2 has no name"),
        (calling({"id": "1", "function": {}}), (), "call 1 of message 2 has no name"),
        (calling({"function": {}}), (), "message 2 has no text in 'content', but None"),
        (calling({"name": "b", "arguments": [1]}), (), "call 1 of message 2 has arguments that"),
        ([ASKED | {"name": "Bob"}], (), r"message 1 \(user\) has 'name' 'Bob', which is not read"),
        ([ASKED | {"images": ["x"]}], (), "has 'images' .'x'., which is not read there: leave"),
        ([ASKED | {"tool_calls": [CALL]}], (), r"message 1 \(user\) has 'tool_calls'"),
        (
            [ASKED, ANSWER | {"reasoning_content": "x"}],
            (),
            r"\(assistant\) has 'reasoning_content'",
        ),
        ([ASKED, ANSWER | {"refusal": "x"}], (), "has 'refusal' 'x'"),
        ([ASKED, ANSWER | {"tool_call_id": "x"}], (), "has 'tool_call_id' 'x'"),
        ([ASKED, {"role": "assistant", "tool_calls": "x"}], (), "message 2 has 'tool_calls' that"),
        ([ASKED, {"role": "assistant", "function_call": "x"}], (), "call 1 of message 2 is no obj"),
    ],
)
def test_what_is_refused(messages, tools, problem):
    with pytest.raises(ValueError, match=problem):
        turns(messages, tools)
