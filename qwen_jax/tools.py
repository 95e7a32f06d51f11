"""Tools and calls of them as the text that Qwen was trained on: ReAct (arXiv 2210.03629).

Messages come as the OpenAI API has them; each question becomes one user turn and one reply, in
which thoughts, calls, their results and the answer follow each other. Knows no ids.
"""

import dataclasses
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

_INSTRUCTION = """Answer the following questions as best you can. You have access to the following \
APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_TOOL = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? "
    "{description} Parameters: {parameters}"
)
_ANSWER = "Thought: I now know the final answer.\nFinal Answer: {text}"


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says: (text, whether that side wrote it); of a reply, results are not its own.

    role: "user" or "assistant".
    """

    role: str
    spans: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """What tells the model of its tools: functions, or {"type": "function", "function": ...}.

    Raises ValueError for what is no tool, or has no name.
    """
    texts, names = [], []
    for number, tool in enumerate(tools, 1):
        what = f"tool {number}"
        function = _function(tool, what)
        name = function.get("name_for_model") or function.get("name")
        human = function.get("name_for_human") or name
        # Parquet has null for what is not there.
        told = function.get("description_for_model") or function.get("description") or ""
        if not name:
            raise ValueError(f"{what} has no name")
        if not all(isinstance(text, str) for text in (name, human, told)):
            raise ValueError(f"{what} has a name or a description that is no text")
        names.append(name)
        parameters = _json(function.get("parameters", {}), f"the parameters of {what}")
        texts.append(_TOOL.format(name=name, human=human, description=told, parameters=parameters))
    return _INSTRUCTION.format(tools="\n\n".join(texts), names=",".join(names))


def turns(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str | None, list[Turn]]:
    """(system message, turns) of a conversation, messages {"role": ..., "content": ...}.

    roles: system (first alone), user, assistant, and tool or function for results. An assistant's
    calls are in `tool_calls`, or in the older `function_call`. With tools, the first user turn
    begins with what tells of them, as in the original's examples for fine-tuning: every reply is
    trained, so none may call what it was not told of (the original's server, which needs the next
    reply alone, puts it in the last turn but one).

    Raises ValueError, naming the message, for another role, an order that cannot be, no text, or
    what has another shape.
    """
    system: str | None = None
    found: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is no object")
        role = message.get("role")
        last = found[-1].role if found else None
        if role == "system":
            if number > 1:
                raise ValueError(f"message {number} is of the system: only the first can be")
            system = _content(message, number)
        elif role == "user":
            found.append(Turn("user", ((_content(message, number), True),)))
        elif role == "assistant":
            if last is None:
                raise ValueError(f"message {number} is a reply to nobody: begin with a user")
            said = _reply(message, number, bool(tools))
            if last == "user":
                found.append(Turn("assistant", ((said, True),)))
            else:
                found[-1] = Turn("assistant", (*found[-1].spans, ("\n" + said, True)))
        elif role in ("tool", "function"):
            if last != "assistant":
                raise ValueError(f"message {number} is the result of no call")
            result = f"\nObservation: {_content(message, number).strip()}"
            found[-1] = Turn("assistant", (*found[-1].spans, (result, False)))
        else:
            allowed = "system, user, assistant, tool, function"
            raise ValueError(f"message {number} is of {reprlib.repr(role)}: allowed are {allowed}")
    if tools and found:  # the first turn is of a user: a reply before it is refused
        question = f"{instruction(tools)}\n\nQuestion: {found[0].text}"
        found[0] = Turn("user", ((question, True),))
    return system, found


def _reply(message: Mapping[str, Any], number: int, with_tools: bool) -> str:
    """An assistant's message as text: its calls, or its answer."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"message {number} has 'tool_calls' that are no list")
    calls = [*calls, *([message["function_call"]] if message.get("function_call") else [])]
    text = _content(message, number, needed=not calls)
    if not calls:
        return _ANSWER.format(text=text) if with_tools else text
    parts = []
    for index, call in enumerate(calls, 1):
        what = f"call {index} of message {number}"
        function = _function(call, what)
        name, arguments = function.get("name"), function.get("arguments")
        if not name or not isinstance(name, str):
            raise ValueError(f"{what} has no name")
        if arguments is None:
            arguments = "{}"
        elif isinstance(arguments, Mapping):
            arguments = _json(arguments, f"the arguments of {what}")
        elif not isinstance(arguments, str):
            raise ValueError(f"{what} has arguments that are neither text nor an object")
        thought = text.strip() or f"Thought: I can use {name}."
        parts.append(f"{thought}\nAction: {name}\nAction Input: {arguments}")
    return "\n".join(parts)


def _function(value: Any, what: str) -> Mapping[str, Any]:
    """The function of a tool or of a call: what is in "function", or all of it."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{what} is no object that holds a function")
    return function


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # such as a date out of Parquet
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def _content(message: Mapping[str, Any], number: int, needed: bool = True) -> str:
    """Its text; parts of type "text" are joined."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        content = [text for text in texts if isinstance(text, str)]
        if len(content) < len(parts):
            raise ValueError(
                f'message {number} has parts that are no text: {{"type": "text", "text": ...}}'
            )
        content = "".join(content)
    if content is None and not needed:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text in 'content'")
    return content
