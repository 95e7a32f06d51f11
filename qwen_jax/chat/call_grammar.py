"""A grammar that holds a reply in ReAct's form, in llguidance's notation of Lark.

llguidance splits text into its terminals as it comes, and does not go back. So the terminals here
say what a line may be, character by character, and do not exclude what it may not be: a line that
has become a marker is then no other line.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.chat import conversation
from qwen_jax.chat.formats import MessageError
from qwen_jax.chat.messages import as_json
from qwen_jax.chat.react import ACTION, FINAL, INPUT, RESULT, THOUGHT
from qwen_jax.runtime import texts

_LINES = 20  # most lines before a call that must be made
_SPACE = r"[ \t]{0,8}"
# JSON allows white space without end, and a model may write it.
_JSON_SPACE = r"[ \t\r\n]{0,64}"


def react(
    tools: Sequence[Mapping[str, Any]], *, required: bool, names: Sequence[str] | None = None
) -> str | None:
    """Return a grammar in Lark of replies that call one of some tools.

    tools: descriptions of functions, as `conversation.instruction` takes them. Arguments of those
        with a true `strict` are held to the schema in `parameters`; those of others to any JSON
        object, or to text if `parameters` describes no object.
    required: whether the reply must call a tool. Otherwise it may be an answer.
    names: the tools that may be called; None for all.

    Returns None if replies are free: nothing is required and no tool is strict. Raises MessageError
    for tools that cannot be called, and names that no tool has.
    """
    found = _callable(tools, names)
    if not required and not any(function.get("strict") is True for function in found.values()):
        return None
    lines, calls = [], []
    for i, (name, function) in enumerate(found.items()):
        calls.append(
            f"CALL{i} {'FREE' if (schema := _schema(function, i)) is None else f'args{i}'}"
        )
        name = json.dumps(name.strip(), ensure_ascii=False)
        lines.append(f'CALL{i}: "{ACTION}" SPACE {name} SPACE "\\n{INPUT}" WHITE')
        if schema is not None:
            lines.append(f"args{i}: %json {schema}")
    start = f"LINE{{0,{_LINES}}} ({' | '.join(calls)})"
    if not required:
        start = f"LINE* ({' | '.join(calls)} | ANSWER | REST)"
    before, anywhere = (ACTION, INPUT, FINAL), _line(())
    return "\n".join(
        [
            f"start: {start}",
            *lines,
            f"SPACE: /{_SPACE}/",
            r"WHITE: /[ \t\r\n]{0,8}/",
            rf"LINE: /{_line(before)}\n/",
            rf"FREE: /{anywhere}(?:\n{_line((*before, THOUGHT))})*/",
            rf"ANSWER: /{FINAL}{anywhere}(?:\n{anywhere})*/",
            f"REST: /{_line(before)}/",
            "",
        ]
    )


def _callable(
    tools: Sequence[Mapping[str, Any]], names: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    """Return the functions that may be called, by name. Raises MessageError."""
    found: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        param = f"tools[{i}]"
        function = conversation.function(tool, param)
        name = conversation.name_of(function, param)
        if not name.strip() or "\n" in name.strip():
            shown = texts.shown(name)
            raise MessageError(f"{param}.function.name", f"{shown}: must be text in one line")
        found[name] = function
    for name in found if names is None else names:
        if name not in found:
            known = ", ".join(map(texts.shown, found)) or "none"
            raise MessageError("tool_choice", f"no tool is named {texts.shown(name)}: {known}")
    if not found:
        raise MessageError("tools", "must be at least one, as one is to be called")
    return {name: found[name] for name in (found if names is None else names)}


def _schema(function: Mapping[str, Any], number: int) -> str | None:
    """Return the JSON schema of a function's arguments as text; None if they are free text."""
    parameters = function.get("parameters")
    told = {} if parameters is None else parameters
    strict = function.get("strict") is True
    if not isinstance(told, Mapping):
        if strict:
            where = f"tools[{number}].function.parameters"
            got = texts.described(told)
            raise MessageError(where, f"must be a JSON schema, as it is strict, got {got}")
        return None
    if not strict and told and told.get("type") != "object" and "properties" not in told:
        return None
    schema = told if strict and told else {"type": "object"}
    space = {"whitespace_pattern": _JSON_SPACE}
    return as_json({**schema, "x-guidance": space}, f"tools[{number}].function.parameters")


def _line(markers: Sequence[str]) -> str:
    """Return a regular expression of lines that neither begin with markers nor hold `Observation:`.

    The lines are without their newline. No marker may have the first letter of `Observation:`.
    """
    first, rest = RESULT[0], RESULT[1:]
    begun = [rest[:i] for i in range(len(rest))]  # after the first letter
    # The first letter begins anew wherever it comes. What is begun is broken off, or the line ends.
    loop = f"{first}(?:{_any(text + first for text in begun)})*"
    broken = loop + f"(?:{_any(_but(text, rest[i]) for i, text in enumerate(begun))})"
    ended = loop + f"(?:{_any(begun)})"
    free = rf"(?:[^{first}\n]|{broken})*(?:{ended})?"
    if not markers:
        return free
    following: dict[str, str] = {}  # the letters after each beginning of a marker
    for marker in markers:
        for i, letter in enumerate(marker):
            following[marker[:i]] = following.get(marker[:i], "") + letter
    other = _any(_but(text, letters) for text, letters in following.items())
    return f"(?:(?:{other}){free}|(?:{_any(following)})(?:{broken}{free}|{ended})?)"


def _any(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


def _but(text: str, letters: str) -> str:
    """A text and one more character, which neither continues nor begins a marker."""
    return rf"{text}[^{letters}{RESULT[0]}\n]"
