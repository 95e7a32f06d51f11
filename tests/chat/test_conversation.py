"""Requests as prompts: the original server's figures, and what it does not know."""

import functools
import json
import unicodedata
from typing import Any

import pytest

from qwen_jax.chat import (
    DEFAULT_SYSTEM,
    ChatML,
    MessageError,
    Prompt,
    conversation,
    example_context,
    make_context,
    page_instruction,
    react,
    tools,
)
from qwen_jax.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.golden_figures import GOLDEN
from tests.support.vocabulary import qwen_tokenizer, tiny_ranks

ROWS = json.loads((GOLDEN / "serve" / "prompts.json").read_text("utf-8"))
EXAMPLES = json.loads((GOLDEN / "serve" / "react.json").read_text("utf-8"))
# What the original refuses, and is served here: its detail, or the name of its exception.
SERVED = [
    "Invalid request",  # two users in a row
    "Invalid request: Expecting exactly one user (or function) role before every assistant role.",
    "Invalid request: Function calling is not yet implemented for stream mode.",
    "KeyError",  # a function without parameters
    ["string_type"],  # a list of parts
    ["literal_error"],  # the role developer
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
USER = {"role": "user", "content": "q"}


def prompt(request: dict[str, Any], **options: Any) -> Prompt:
    described = request.get("functions") or request.get("tools") or ()
    return ChatML(qwen_tokenizer()).prompt(
        request["messages"], tools=described, stop=request.get("stop") or (), **options
    )


def test_prompts_match_the_original():
    matched = 0
    for row in ROWS:
        expected = row.get("correct", row)
        if "ids" not in expected:
            continue
        for request in filter(None, (row["request"], row.get("modern"))):
            made, matched = prompt(request), matched + 1
            assert made.ids == expected.get("ids_safe", expected["ids"])
            assert unicodedata.normalize("NFC", made.text) == unicodedata.normalize(
                "NFC", expected["prompt"]
            )
            assert made.mode == expected["mode"]
            if expected is row:
                assert list(made.stops) == (row.get("stop") or [])
                assert [list(ids) for ids in made.stop_ids] == (row["stop_ids"] or [])
    assert matched > 140


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["status"] != 200 and "correct" not in row]
)
def test_what_the_original_refuses(row):
    detail = row.get("detail") or row["error"]
    if isinstance(detail, list):
        detail = [complaint["type"] for complaint in detail]
    if detail in SERVED and row["request"]["messages"][0]["role"] != "tool":
        assert prompt(row["request"]).mode == "chat"
    else:
        with pytest.raises(MessageError, match=r"^messages(\[\d+\]\.(role|content))?: ") as error:
            prompt(row["request"])
        assert str(error.value).startswith(f"{error.value.param}: ")


def test_prompts_of_the_examples():
    """Their ids are of the finished text, where a newline merges with white space after it."""
    tokenizer = qwen_tokenizer()
    differ = 0
    for row in EXAMPLES:
        if "error" in row:
            with pytest.raises(NotImplementedError, match="'json' or 'code', got 'none'"):
                example_context(tokenizer, row["tools"], row["history"])
        elif row["source"] == "react_prompt":
            text = react.question(page_instruction(row["tools"]), row["query"])
            assert text == row["prompt"] and tokenizer.encode(text) == row["ids"]
        else:
            text, ids = example_context(tokenizer, row["tools"], row["history"])
            assert text == row["prompt"]
            assert tokenizer.encode(text, allowed_special="all") == row["ids"]
            if ids != row["ids"]:
                differ += 1
                assert row["history"][-1][0].startswith(" ")
                assert tokenizer.decode(ids) == text
    assert differ == 5


def test_training_data_and_the_server_describe_tools_alike():
    compared = 0
    for row in ROWS:
        found = row["request"].get("functions")
        if not found or not all(tool.get("name") or tool.get("name_for_model") for tool in found):
            continue
        compared += 1
        as_server = conversation.instruction([{"parameters": {}, **tool} for tool in found])
        null = any(tool.get("description", "") is None for tool in found)
        assert (tools.instruction(found) == as_server) is not null
    assert compared > 60


def test_training_data_and_the_server_render_replies_alike():
    """Where neither has to complete anything: all calls have thoughts and results."""
    said = [
        USER,
        {"role": "assistant", "content": "Thought: a", "tool_calls": [called("1"), called("2")]},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "assistant", "content": "Done."},
    ]
    server = conversation.read([*said, USER], [TOOL]).turns
    assert (
        server[1][1]
        == tools.turns(said, [TOOL])[1][1].text
        == (
            "Thought: a\nAction: weather\nAction Input: {}\nObservation: one\n"
            "Thought: I can use weather.\nAction: weather\nAction Input: {}\nObservation: two\n"
            "Thought: I now know the final answer.\nFinal Answer: Done."
        )
    )


def called(identity: str, **changed: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": "{}"} | changed
    return {"id": identity, "type": "function", "function": function}


def test_where_the_server_differs_from_training_data():
    """The table in `conversation`, row by row."""
    call = {"role": "assistant", "content": None, "tool_calls": [called("1")]}
    result = {"role": "tool", "tool_call_id": "1", "content": "\n r \r\n"}
    read = functools.partial(conversation.read, tools=[TOOL])
    reply = "Thought: \nAction: weather\nAction Input: {}"
    later = [
        USER,
        {"role": "assistant", "content": "a"},
        USER,
        {"role": "assistant", "content": "b"},
    ]
    assert ["Begin!" in text for _, text in read([*later, USER]).turns] == [0, 0, 1, 0, 0]
    assert read([USER, call, result]).turns[1][1] == f"{reply}\nObservation:  r\nThought:"
    assert read([USER, call, result], opened=False).turns[1][1] == f"{reply}\nObservation:  r"
    assert read([{"role": "user", "content": None}], tools=()).turns == [("user", "")]
    plain = read([USER, {"role": "assistant", "content": None}, USER], tools=()).turns
    assert plain[1] == ("assistant", "")
    spaced = {"role": "assistant", "function_call": {"name": "f", "arguments": "{} \n"}}
    assert read([USER, call, result, spaced, USER]).turns[1][1].endswith("Action Input: {}")
    stray = {"role": "tool", "tool_call_id": "2", "content": "s"}
    assert (
        read([USER, call, result, stray])
        .turns[1][1]
        .endswith("\nObservation:  r\nObservation: s\nThought:")
    )
    assert read([{"role": "developer", "content": " s \n"}, USER]).system == " s"
    old = {"role": "assistant", "function_call": {"name": "f", "arguments": {"a": None}}}
    new = {"role": "assistant", "tool_calls": [called("1", arguments={"a": None})]}
    assert read([USER, old]).turns[1][1].endswith("Input: {'a': None}")
    assert read([USER, new]).turns[1][1].endswith('Input: {"a": null}')


def test_what_the_model_continues():
    """A reply that comes last is continued as it is, and one about a result begins as a thought."""
    answer = {"role": "assistant", "content": "so"}
    call = {"role": "assistant", "content": None, "tool_calls": [called("1")]}
    result = {"role": "tool", "tool_call_id": "1", "content": "r"}
    cases = [
        ([USER], {}, "chat", "reply", "q<|im_end|>\n<|im_start|>assistant\n"),
        ([USER, answer], {}, "completion", "answer", "answer.\nFinal Answer: so"),
        ([USER, call], {}, "completion", "reply", "\nAction: weather\nAction Input: {}"),
        ([USER, call, result], {}, "completion", "thought", "\nObservation: r\nThought:"),
        ([USER], {"add_generation_prompt": False}, "closed", "reply", "q<|im_end|>"),
        ([USER, call, result], {"add_generation_prompt": False}, "closed", "reply", " r<|im_end|>"),
    ]
    for messages, options, mode, begins, end in cases:
        made = prompt({"messages": messages, "tools": [TOOL]}, **options)
        assert (made.mode, made.begins) == (mode, begins)
        assert made.text.endswith(end)
        assert qwen_tokenizer().decode(made.ids) == made.text
    options = {"add_generation_prompt": False, "continue_final_message": True}
    made = prompt({"messages": [USER, answer]}, **options)
    assert (made.mode, made.begins) == ("completion", "plain")
    assert made.text.endswith("<|im_start|>assistant\nso")
    with pytest.raises(MessageError, match="continue_final_message: the last message has role 'us"):
        prompt({"messages": [USER]}, continue_final_message=True)


def test_a_stop_may_be_one_text():
    made = prompt({"messages": [USER], "tools": [TOOL], "stop": "\n\nEND"})
    assert made.stops == ("\n\nEND", "END", "Observation:") and made.asked == ("\n\nEND", "END")
    with pytest.raises(MessageError, match=r"^stop: stop '': an empty text"):
        prompt({"messages": [USER], "stop": [""]})


def test_no_text_of_a_request_becomes_a_control_token():
    tokenizer = Tokenizer(tiny_ranks())
    spelled = "".join(SPECIAL_TOKENS[:3])
    tool = {"name": spelled, "description": spelled, "parameters": {spelled: spelled}}
    call = {"name": spelled, "arguments": spelled}
    messages = [
        {"role": "system", "content": spelled},
        {"role": "user", "content": [{"type": "text", "text": spelled}]},
        {"role": "assistant", "content": spelled, "function_call": call},
        {"role": "function", "content": spelled},
        {"role": "assistant", "content": spelled},
        {"role": "user", "content": spelled},
        {"role": "assistant", "content": spelled},
    ]
    made = ChatML(tokenizer).prompt(messages, tools=[tool])
    control = [i for i in made.ids if i >= tokenizer.eod_id]
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    assert control == [start, end] * 4 + [start]
    assert tokenizer.decode(made.ids) == made.text


def test_only_a_window_drops_turns():
    said = [message for _ in range(9) for message in (USER, {"role": "assistant", "content": "a"})]
    context = functools.partial(make_context, qwen_tokenizer(), "q", [("q", "a")] * 9)
    for window, users in ((None, 10), (40, 3)):
        made = prompt({"messages": [*said, USER]}, max_window_size=window)
        size = 6144 if window is None else window
        assert (made.text, made.ids) == context(DEFAULT_SYSTEM, max_window_size=size)
        assert made.text.count("<|im_start|>user") == users


@pytest.mark.parametrize(
    ("messages", "described", "problem"),
    [
        ([], (), "messages: must be a list of at least one message"),
        (["x"], (), r"messages\[0\]: must be an object with role and content, got str 'x'"),
        ([{"role": 5}], (), r"messages\[0\].role: 5: allowed are system, developer, user, assi"),
        (
            [USER | {"content": 5}],
            (),
            r"messages\[0\].content: it has no text in 'content', but in",
        ),
        ([USER | {"content": "\ud800"}], (), r"messages\[0\].content: it holds half a character"),
        (
            [USER | {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            (),
            r"messages\[0\].content\[1\].type: 'image_url' cannot be served: allowed is 'text'",
        ),
        ([USER | {"content": [{"type": "refusal"}]}], (), r"content\[0\].type: 'refusal' cannot"),
        ([USER | {"content": [{"type": "text"}]}], (), r"messages\[0\].content: it has parts that"),
        ([USER, {"role": "assistant"}], (), r"messages\[1\].content: is missing"),
        (
            [USER, {"role": "assistant", "tool_calls": {"a": 1}}],
            (),
            r"messages\[1\].tool_calls: must be a list, got dict",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [called("1"), called("2", name=None)]}],
            (),
            r"messages\[1\].tool_calls\[1\].name: must be text, got None",
        ),
        (
            [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": 5}}],
            (),
            r"messages\[1\].function_call.arguments: must be text, got int 5",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [called("1", name="\udc00")]}],
            (),
            r"messages\[1\].tool_calls\[0\]: it holds half a character",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}],
            (),
            r"messages\[1\].tool_calls\[0\].type: 'custom' cannot be served",
        ),
        ([USER], [3], r"tools\[0\]: is no object that holds a function"),
        ([USER], [{"type": "web_search"}], r"tools\[0\].type: 'web_search' cannot be served"),
        ([USER], [TOOL, {"name": None}], r"tools\[1\].name: must be text, got None"),
        ([USER], [{"description": 5}], r"tools\[0\].description: must be text, got int 5"),
        (
            [USER],
            [{"parameters": {1, 2}}],
            r"tools\[0\].parameters: they cannot be written as JSON",
        ),
    ],
)
def test_what_is_refused(messages, described, problem):
    with pytest.raises(MessageError, match=f"^{problem}" if problem[0] != "c" else problem):
        prompt({"messages": messages, "tools": described})


def test_a_refusal_is_what_an_assistant_said():
    said = {"role": "assistant", "content": None, "refusal": "No."}
    parts = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    for reply in (said, parts):
        assert conversation.read([USER, reply, USER]).turns[1] == ("assistant", "No.")
