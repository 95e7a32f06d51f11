"""Grammars of replies that call tools, compiled for the published vocabulary."""

import functools
import json
import re

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.chat import ChatML, MessageError, parse_reply
from qwen_jax.chat.call_grammar import _line, react
from qwen_jax.chat.react import RESULT
from qwen_jax.chat.tokenizer import PATTERN
from tests.support.golden_figures import GOLDEN
from tests.support.vocabulary import qwen_tokenizer

OBJECT = {
    "type": "object",
    "properties": {"q": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["q"],
    "additionalProperties": False,
}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": OBJECT}}
STRICT = {"type": "function", "function": {**SEARCH["function"], "name": "lookup", "strict": True}}
DRAW = {"name": " 画图 ", "parameters": {"type": "object"}}
CODE = {"name": 'run "py"', "parameters": [{"name": "code"}]}
TOOLS = [SEARCH, STRICT, DRAW, CODE]
MARKERS = ("Action:", "Action Input:", "Final Answer:")


@functools.cache
def vocabulary() -> llguidance.LLTokenizer:
    tokenizer = qwen_tokenizer()
    return llguidance.LLTokenizer.from_tiktoken(
        encoder=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
        pattern=PATTERN,
        eos_token=[tokenizer.im_end_id, tokenizer.eod_id],
        n_vocab=151_936,
    )


@functools.cache
def compiled(grammar: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(vocabulary(), grammar, log_level=0)
    assert not matcher.get_error()
    return matcher


def holds(grammar: str | None, text: str) -> bool:
    """Whether a grammar allows a text, to its end."""
    assert grammar is not None
    matcher, ids = compiled(grammar).deep_copy(), qwen_tokenizer().encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


REQUIRED = react(TOOLS, required=True)
NAMED = react(TOOLS, required=True, names=["lookup"])
AUTO = react(TOOLS, required=False)
ANSWERS = [
    "Just an answer.",
    "Final Answer: 42\n\nAction: none",
    "Thought: k\nFinal Answer: ",
    "Actions\nAction\nAct\nFinal Answers: x\nObservation",
    "",
]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('Thought: t\nAction: search\nAction Input: {"q": "x"}', (1, 0, 1)),
        ('Action: search\nAction Input: {"x": [1, null]}', (1, 0, 1)),
        ('Two\nlines\n\nAction:search \nAction Input:\n{"q":\n"x"}', (1, 0, 1)),
        ("I see.\nAction: 画图\nAction Input: {}", (1, 0, 1)),
        ('Action: run "py"\nAction Input: ```py\n1 + 1\n```', (1, 0, 1)),
        ('Thought: t\nAction: lookup\nAction Input: {"q": "Observation: x", "n": 3}', (1, 1, 1)),
        ('Thought: t\nAction: lookup\nAction Input: {"q": 1}', (0, 0, 0)),
        ('Action: lookup\nAction Input: {"q": "x", "m": 1}', (0, 0, 0)),
        ("Action: search\nAction Input: plain", (0, 0, 0)),
        ("Action: search\nAction Input: {}\nThought: more", (0, 0, 0)),
        ('Action: run "py"\nAction Input: 1\nAction: search', (0, 0, 0)),
        ('Action: run "py"\nAction Input: 1\nThought: more', (0, 0, 0)),
        ('Action: run "py"\nAction Input: see Observation: x', (0, 0, 0)),
        ("Action: other\nAction Input: {}", (0, 0, 0)),
        ("Action: searching\nAction Input: {}", (0, 0, 0)),
        ("The Observation: x\nAction: search\nAction Input: {}", (0, 0, 0)),
        ("Final Answer: x\nAction: search\nAction Input: {}", (0, 0, 1)),
        *((text, (0, 0, 1)) for text in ANSWERS),
        ("An Observation: x", (0, 0, 0)),
        ("Final Answer: ObsObservation: x", (0, 0, 0)),
        ("x\n" * 21 + "Action: search\nAction Input: {}", (0, 0, 1)),
    ],
)
def test_what_a_grammar_allows(text, held):
    """When a call is required, when one of a name is, and when there is a choice."""
    assert tuple(holds(grammar, text) for grammar in (REQUIRED, NAMED, AUTO)) == held
    if held[0]:
        assert len(parse_reply(text)[1]) == 1


def test_right_calls_of_the_original_are_allowed():
    names = ("search", "weather", "画图")
    tools = [{"name": name, "parameters": {"type": "object"}} for name in names]
    grammar = react([*tools, {"name": "code_interpreter", "parameters": []}], required=True)
    allowed, others = 0, 0
    for row in json.loads((GOLDEN / "serve" / "replies.json").read_text("utf-8")):
        text, call = row["output"].partition("\nObservation:")[0].rstrip(), row["function_call"]
        known = call and call["name"] in (*names, "code_interpreter")
        if not known or "correct" in row or "arguable" in row:
            others += not holds(grammar, text)
            continue
        free = call["name"] == "code_interpreter"
        # llguidance writes characters of JSON as they are, and not as \u escapes.
        whole = free or (call["arguments"][-1:] == "}" and "\\u" not in call["arguments"])
        assert holds(grammar, text) is whole, text
        allowed += whole
    assert allowed > 12 and others > 30


@given(st.lists(st.sampled_from((*MARKERS, RESULT, "Obs", "O", "bs", "Act", "Final ", " ", "x"))))
def test_a_line_is_what_holds_no_marker(parts):
    line = "".join(parts)
    assert bool(re.fullmatch(_line(()), line)) is (RESULT not in line)
    begins = line.startswith(MARKERS)
    assert bool(re.fullmatch(_line(MARKERS), line)) is (RESULT not in line and not begins)


def test_a_reply_is_free_unless_something_is_asked_of_it():
    chat = ChatML(qwen_tokenizer())
    assert chat.grammar([SEARCH, DRAW, CODE], required=False) is None
    assert chat.grammar([SEARCH, STRICT], required=False, names=["search"]) is None
    assert chat.grammar([SEARCH], required=True) == react([SEARCH], required=True)


@pytest.mark.parametrize(
    ("tools", "names", "problem"),
    [
        ([], None, "tools: must be at least one, as one is to be called"),
        ([SEARCH], ["seek"], "tool_choice: no tool is named 'seek': 'search'"),
        ([{"parameters": {}}], None, r"tools\[0\].function.name: '': must be text in one line"),
        ([SEARCH, {"name": "a\nb"}], None, r"tools\[1\].function.name: 'a\\nb': must be text in"),
        ([{**CODE, "strict": True}], None, r"tools\[0\].function.parameters: must be a JSON schem"),
    ],
)
def test_what_cannot_be_required(tools, names, problem):
    with pytest.raises(MessageError, match=f"^{problem}"):
        react(tools, required=True, names=names)
