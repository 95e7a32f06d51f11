"""Tool descriptions and tool calls of training data, as text in the words of `react`.

Messages come in the form of the OpenAI API. Every reply is trained, so each is written as the model
shall write it. The server, which only needs the next reply, renders some things as the original
server does instead: `conversation` lists them. This module knows no token ids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.chat import react
from qwen_jax.chat.messages import (
    as_json,
    check_read,
    function_of,
    given,
    listed,
    text_of,
)
from qwen_jax.chat.react import Step
from qwen_jax.runtime import texts

# The keys that are read from a message beside its role and content, by its role.
_READ: dict[str, tuple[str, ...]] = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "function_call"),
    "tool": ("tool_call_id", "name"),
    "function": ("tool_call_id", "name"),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """The text of one turn in a conversation, in spans.

    role: "user" or "assistant".
    spans: pairs (text, whether this role wrote it). In a reply, the results of tools are text that
        the assistant did not write.
    """

    role: str
    spans: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The joined text of all spans."""
        return "".join(text for text, _ in self.spans)


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the text that describes tools to the model, in the words of the original Qwen code.

    tools: descriptions of functions, or {"type": "function", "function": ...} with one of them.

    Raises ValueError for an object that is not a tool, or has no name.
    """
    shown, names = [], []
    for number, tool in enumerate(listed("tools", tools), 1):
        what = f"tool {number}"
        function = function_of(tool, what)
        name = function.get("name_for_model") or function.get("name")
        human = function.get("name_for_human") or name
        # Parquet has null for missing values.
        told = function.get("description_for_model") or function.get("description") or ""
        if not name:
            raise ValueError(f"{what} has no name")
        if not (isinstance(name, str) and isinstance(human, str) and isinstance(told, str)):
            raise ValueError(f"{what} has a name or a description that is no text")
        names.append(name)
        parameters = function.get("parameters")
        parameters = as_json({} if parameters is None else parameters, f"the parameters of {what}")
        text = react.Described(name, human, told, parameters).text
        shown.append(texts.check_whole(what, text))
    return react.instruct(shown, names)


def turns(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str | None, list[Turn]]:
    """Convert messages of the OpenAI API to (system message or None, turns).

    messages: {"role": ..., "content": ...}, with the roles system (first only), user, assistant,
        and tool or function for results. An assistant's calls are in `tool_calls`, or in the older
        `function_call`. Results follow their calls, and are matched by `tool_call_id`, by name, or
        in order.
    tools: descriptions of functions, as `instruction` takes them. They go before the first user
        message, as in Qwen's fine-tuning examples. Every reply is trained, so none may call a tool
        that is not described before it. (Qwen's server only needs the next reply, and puts the
        description into the last turn but one.)

    Raises ValueError that names the message for an unknown role, an impossible order, a wrong
    shape, a missing text, or a key with content that would be lost (`check_read`).
    """
    system: str | None = None
    found: list[tuple[str, list[Step]]] = []
    tools = listed("tools", tools)
    for number, message in enumerate(listed("messages", messages), 1):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"message {number} is no object with role and content: {texts.described(message)}"
            )
        role = message.get("role")
        if isinstance(role, str) and role in _READ:
            read = ("role", "content", *_READ[role])
            check_read(f"message {number} ({role})", message, read=read)
        last, steps = found[-1] if found else (None, [])
        if role == "system":
            if number > 1:
                raise ValueError(f"message {number} has role 'system': only the first may")
            system = text_of(message.get("content"), what=f"message {number}")
        elif role == "user":
            found.append(
                ("user", [Step(text_of(message.get("content"), what=f"message {number}"))])
            )
        elif role == "assistant":
            if last is None:
                raise ValueError(f"message {number} is a reply to nobody: begin with a user")
            said = _reply(message, number, with_tools=bool(tools))
            if last == "user":
                found.append(("assistant", said))
            else:
                for step in steps:
                    step.waits = False
                steps += said
        elif role in ("tool", "function"):
            _answered(steps, message, number=number)
        else:
            allowed = "system, user, assistant, tool, function"
            raise ValueError(
                f"message {number} has role {texts.shown(role)}: allowed are {allowed}"
            )
    if tools and found:  # the first turn is a user's, as a reply before it is refused
        question = found[0][1][0]
        question.text = react.question(instruction(tools), question.text)
    return system, [Turn(role, tuple(react.spans(steps))) for role, steps in found]


def _answered(steps: Sequence[Step], message: Mapping[str, Any], *, number: int) -> None:
    """Store a tool's result in the step of its call, found by id, by name, or in order.

    steps: the steps of the assistant's turn.
    message: the message with the result.
    number: the number of the message, from 1, for errors.

    A call with the same id comes first; without ids, a call of the same name, and else the next
    call. Raises ValueError if no call waits for a result.
    """
    waiting = [step for step in steps if step.waits]
    wanted, name = message.get("tool_call_id") or None, message.get("name")
    by_id = [step for step in waiting if wanted is not None and step.id == wanted]
    open_ = [step for step in waiting if wanted is None or step.id is None]
    found = [*by_id, *(step for step in open_ if step.name == name), *open_]
    if not found:
        raise ValueError(f"message {number} is the result of no call")
    found[0].waits, found[0].result = (
        False,
        text_of(message.get("content"), what=f"message {number}").strip(),
    )


def _reply(message: Mapping[str, Any], number: int, *, with_tools: bool) -> list[Step]:
    """Convert an assistant's message to steps: its tool calls, or its answer.

    number: the number of the message, from 1, for errors.
    with_tools: whether tools are described, so that an answer is written in ReAct's form.

    Content beside calls becomes the thought before the first call.
    """
    calls = message.get("tool_calls")
    calls = calls if given(calls) else []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"message {number} has 'tool_calls' that are no list")
    older = message.get("function_call")
    calls = [*calls, *([older] if given(older) else [])]
    text = text_of(message.get("content"), what=f"message {number}", needed=not calls)
    if not calls:
        return [Step(react.answer(text) if with_tools else text)]
    thought = text.strip().removeprefix(react.THOUGHT).strip()
    steps = []
    for index, call in enumerate(calls, 1):
        what = f"call {index} of message {number}"
        function = function_of(call, what)
        name, arguments = function.get("name"), function.get("arguments")
        if not name or not isinstance(name, str):
            raise ValueError(f"{what} has no name")
        if arguments is None:
            arguments = "{}"
        elif isinstance(arguments, Mapping):
            arguments = as_json(arguments, f"the arguments of {what}")
        elif not isinstance(arguments, str):
            raise ValueError(f"{what} has arguments that are neither text nor an object")
        own = index == 1 and thought
        said = f"{react.THOUGHT} {thought}" if own else react.thought_for(name)
        made = react.call(said, name, arguments=arguments)
        steps.append(Step(texts.check_whole(what, made), call.get("id"), name, waits=True))
    return steps
