"""Messages of a chat request as turns in ChatML, as the original Qwen server renders them.

The words are those of `react`, as in training data (`tools.turns`). The two differ where a server
has to complete a reply, and where the original server, which is followed here, does otherwise:

* Tools are described before the question of the last complete pair, or before the last question
  where no reply is complete, and not before the first question.
* A result that comes last is followed by `Thought:`, which the model continues.
* A call without a thought has an empty one, and not `I can use NAME.`, which only the later calls
  of one message have.
* Contents and results lose leading newlines and trailing white space, and nothing else.
* A null content of a user, of a result, or of a reply without calls is empty text.
* A result for which no call waits is appended to the reply, and several replies are one.
* A conversation without a question is refused, and so is a result before any reply.
* A function may have no name, and a description that is null is the word `None`.

This module knows no token ids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.chat import messages as checks
from qwen_jax.chat import react
from qwen_jax.chat.formats import MessageError
from qwen_jax.chat.prompt import DEFAULT_SYSTEM
from qwen_jax.chat.react import Step
from qwen_jax.runtime import texts

_SYSTEM, _RESULTS = ("system", "developer"), ("tool", "function")
_ROLES = (*_SYSTEM, "user", "assistant", *_RESULTS)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation as text.

    system: the system message.
    turns: pairs (role, content), oldest first.
    last: the role of the last message.
    calls: whether the last message has tool calls.
    """

    system: str
    turns: list[tuple[str, str]]
    last: str
    calls: bool


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the text that describes tools to the model, as the original server writes it.

    tools: descriptions of functions, or {"type": "function", "function": ...} with one of them.

    Raises MessageError for an object that is not a tool.
    """
    found = [_described(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    return react.instruct([tool.text for tool in found], [tool.name for tool in found])


def function(tool: object, param: str) -> Mapping[str, Any]:
    """Return the function of a tool. `param` says where it is. Raises MessageError."""
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else "function"
    if kind != "function":
        shown = texts.shown(kind)
        raise MessageError(f"{param}.type", f"{shown} cannot be served: allowed is 'function'")
    try:
        return checks.function_of(tool, param)
    except ValueError as error:
        raise MessageError(param, str(error).removeprefix(param).strip()) from None


def name_of(called: Mapping[str, Any], param: str) -> str:
    """Return the name by which a model calls a function; "" if it has none."""
    name = called.get("name_for_model", called.get("name", ""))
    if not isinstance(name, str):
        raise MessageError(f"{param}.name", f"must be text, got {texts.described(name)}")
    return name


def _described(tool: object, param: str) -> react.Described:
    """Read a tool. Raises MessageError."""
    called = function(tool, param)
    name = name_of(called, param)
    human = called.get("name_for_human", called.get("name", ""))
    told = called.get("description_for_model", called.get("description", ""))
    told = "None" if told is None else told  # the original server's way
    for key, value in (("name_for_human", human), ("description", told)):
        if not isinstance(value, str):
            got = texts.described(value)
            raise MessageError(f"{param}.{key}", f"must be text, got {got}")
    try:
        parameters = checks.as_json(called.get("parameters", {}), "they")
        found = react.Described(name, human, told, parameters)
        texts.check_whole("it", found.text)
    except ValueError as error:
        raise MessageError(f"{param}.parameters", str(error)) from None
    return found


def read(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    opened: bool = True,
) -> Conversation:
    """Convert the messages of a request to a conversation.

    messages: {"role": ..., "content": ...}, with the roles developer or system (first only), user,
        assistant, and tool or function for results. Contents are text, null, or lists of
        {"type": "text", "text": ...}. Calls are in `tool_calls`, or in the older `function_call`.
    tools: descriptions of functions, as `instruction` takes them.
    opened: whether the model continues after a result.

    Raises MessageError that names the message and the field.
    """
    if not messages or not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise MessageError("messages", "must be a list of at least one message")
    turns: list[tuple[str, list[Step]]] = []
    system = DEFAULT_SYSTEM
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        role = _role(message, param, first=number == 0)
        content = _content(message, param, role=role)
        if role in _SYSTEM:
            system = content
        elif role == "user":
            turns.append(("user", [Step(content)]))
        elif role == "assistant":
            _add_reply(turns, _reply(message, content, param=param, with_tools=bool(tools)), param)
        else:
            _add_result(turns, message, param, content=content)
    last, calls = messages[-1], False
    if not any(role == "user" for role, _ in turns):
        raise MessageError("messages", "no message has role 'user': at least one must")
    if last["role"] in _RESULTS and opened:
        turns[-1][1].append(Step(react.THOUGHT))
    elif last["role"] == "assistant":
        calls = any(checks.given(last.get(key)) for key in ("tool_calls", "function_call"))
    if tools:
        replied = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        asked = turns[replied[-1] - 1 if replied else -1][1][0]
        asked.text = react.question(instruction(tools), asked.text)
    joined = [(role, "".join(text for text, _ in react.spans(steps))) for role, steps in turns]
    said = [(role, trimmed(text) if role == "assistant" else text) for role, text in joined]
    return Conversation(system, said, last["role"], calls)


def _role(message: object, param: str, *, first: bool) -> str:
    """Return the role of a message. Raises MessageError if it is not allowed there."""
    if not isinstance(message, Mapping):
        got = texts.described(message)
        raise MessageError(param, f"must be an object with role and content, got {got}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise MessageError(f"{param}.role", f"{texts.shown(role)}: allowed are {allowed}")
    if role in _SYSTEM and not first:
        raise MessageError(f"{param}.role", f"{role!r}: only the first message may be one")
    return role


def _content(message: Mapping[str, Any], param: str, *, role: str) -> str:
    """Return the trimmed text of a message. Raises MessageError if it has none, or another kind."""
    content, where = message.get("content"), f"{param}.content"
    if content is None and role == "assistant":
        content = message.get("refusal")  # what a model said instead of a content
    called = any(checks.given(message.get(key)) for key in ("tool_calls", "function_call"))
    if "content" not in message and content is None and not (role == "assistant" and called):
        raise MessageError(where, "is missing: give a text, or null")
    if isinstance(content, list):
        content = [_part(part, f"{where}[{i}]", role=role) for i, part in enumerate(content)]
    try:
        text = checks.text_of(content, what="it", needed=role in _SYSTEM)
    except ValueError as error:
        raise MessageError(where, str(error)) from None
    return trimmed(text)


def _part(part: object, param: str, *, role: str) -> object:
    """Check a part of a content, and return it as a part of text. Raises MessageError."""
    kind = part.get("type") if isinstance(part, Mapping) else part
    if kind == "refusal" and role == "assistant" and isinstance(part, Mapping):
        return {"type": "text", "text": part.get("refusal")}
    if kind != "text":
        problem = f"{texts.shown(kind)} cannot be served: allowed is 'text'"
        raise MessageError(f"{param}.type", problem)
    return part


def _reply(message: Mapping[str, Any], content: str, *, param: str, with_tools: bool) -> list[Step]:
    """Convert an assistant's message to steps: its calls, or its answer. Raises MessageError."""
    calls: list[tuple[str, Any]] = []
    if checks.given(several := message.get("tool_calls")):
        if not isinstance(several, Sequence) or isinstance(several, str):
            got = texts.described(several)
            raise MessageError(f"{param}.tool_calls", f"must be a list, got {got}")
        calls += [(f"{param}.tool_calls[{i}]", call) for i, call in enumerate(several)]
    if checks.given(older := message.get("function_call")):
        calls.append((f"{param}.function_call", older))
    if not calls:
        return [Step(react.answer(content) if with_tools else content)]
    thought = content if content.startswith(react.THOUGHT) else f"{react.THOUGHT} {content}"
    steps = []
    for index, (where, call) in enumerate(calls):
        called = function(call, where)
        name, arguments = called.get("name"), called.get("arguments", "{}")
        if not isinstance(name, str):
            raise MessageError(f"{where}.name", f"must be text, got {texts.described(name)}")
        if isinstance(arguments, Mapping):
            # OpenAI's are text. The original server prints what is in the older field as Python.
            older = where.endswith(".function_call")
            arguments = str(arguments) if older else checks.as_json(arguments, where)
        if not isinstance(arguments, str):
            got = texts.described(arguments)
            raise MessageError(f"{where}.arguments", f"must be text, got {got}")
        said = react.call(
            thought if index == 0 else react.thought_for(name), name, arguments=arguments
        )
        try:
            said = texts.check_whole("it", said)
        except ValueError as error:
            raise MessageError(where, str(error)) from None
        identity = call.get("id") if isinstance(call, Mapping) else None
        steps.append(Step(said, identity, name, waits=True))
    return steps


def _add_reply(turns: list[tuple[str, list[Step]]], steps: list[Step], param: str) -> None:
    """Append a reply to the conversation. Raises MessageError if nobody has asked."""
    if not turns:
        raise MessageError(f"{param}.role", "'assistant' is a reply to nobody: begin with a user")
    role, said = turns[-1]
    if role == "assistant":
        said += steps
    else:
        steps[0].text = trimmed(steps[0].text)
        turns.append(("assistant", steps))


def _add_result(
    turns: list[tuple[str, list[Step]]], message: Mapping[str, Any], param: str, *, content: str
) -> None:
    """Put a tool's result after its call, or at the end. Raises MessageError without a reply."""
    if not turns or turns[-1][0] != "assistant":
        role = texts.shown(message["role"])
        raise MessageError(f"{param}.role", f"{role} is the result of no call: it follows a reply")
    steps, wanted = turns[-1][1], message.get("tool_call_id")
    for step in steps:
        if step.waits and wanted is not None and step.id == wanted:
            step.waits, step.result = False, content
            return
    steps.append(Step(f"{react.RESULT} {content}"))


def trimmed(text: str) -> str:
    """Return a text without leading newlines and trailing white space, as the original does."""
    return text.lstrip("\n").rstrip()
