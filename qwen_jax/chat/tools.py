"""Tool descriptions and tool calls as the text that Qwen was trained on: ReAct (arXiv 2210.03629).

Messages come in the form of the OpenAI API. Each question becomes a user turn and a reply, in which
thoughts, calls, their results and the answer follow each other. This module knows no token ids.
"""

import dataclasses
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.runtime import texts

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
# The keys that are read from a message beside its role and content, by its role.
_READ: dict[str, tuple[str, ...]] = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "function_call"),
    "tool": ("tool_call_id", "name"),
    "function": ("tool_call_id", "name"),
}
# Keys of metadata, which the model does not see. The last four weight a message in the loss, which
# the training recipe decides.
_NOTES = frozenset(
    (
        "id", "uuid", "message_id", "parent_id", "index", "turn", "turn_id",
        "created", "created_at", "updated_at", "timestamp", "time", "date",
        "lang", "language", "model", "source", "metadata", "meta", "cache_control",
        "annotations", "logprobs", "finish_reason", "usage", "token_count", "score", "rating",
        "weight", "train", "trainable", "loss",
    )
)  # fmt: skip
# Keys with content for a model, which Qwen's text format has no place for.
_CONTENT = frozenset(
    (
        "reasoning_content", "reasoning", "reasoning_details", "thinking", "thought", "thoughts",
        "refusal", "image", "images", "image_url", "video", "videos", "audio", "audios", "file",
        "files", "attachments", "parts", "name", "prefix", "tool_calls", "tool_call_id",
        "function_call",
    )
)  # fmt: skip
_ANSWER = "Thought: I now know the final answer.\nFinal Answer: {text}"


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


@dataclasses.dataclass
class _Step:
    """One step of a turn: a tool call with its result, or other text.

    text: the text of the step, without the result.
    id: the id of the call.
    name: the name of the called tool.
    waits: whether the call still lacks a result.
    result: the result of the call, or None.
    """

    text: str
    id: Any = None
    name: str = ""
    waits: bool = False
    result: str | None = None


def _turn(role: str, steps: Sequence[_Step]) -> Turn:
    """Join the steps of a turn into one Turn, with each call's result after it."""
    spans: list[tuple[str, bool]] = []
    for step in steps:
        spans.append((f"\n{step.text}" if spans else step.text, True))
        if step.result is not None:
            spans.append((f"\nObservation: {step.result}", False))
    return Turn(role, tuple(spans))


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the text that describes tools to the model, in the words of the original Qwen code.

    tools: descriptions of functions, or {"type": "function", "function": ...} with one of them.

    Raises ValueError for an object that is not a tool, or has no name.
    """
    shown, names = [], []
    for number, tool in enumerate(_listed("tools", tools), 1):
        what = f"tool {number}"
        function = _function(tool, what)
        name = function.get("name_for_model") or function.get("name")
        human = function.get("name_for_human") or name
        # Parquet has null for missing values.
        told = function.get("description_for_model") or function.get("description") or ""
        if not name:
            raise ValueError(f"{what} has no name")
        if not all(isinstance(text, str) for text in (name, human, told)):
            raise ValueError(f"{what} has a name or a description that is no text")
        names.append(name)
        parameters = function.get("parameters")
        parameters = _json({} if parameters is None else parameters, f"the parameters of {what}")
        text = _TOOL.format(name=name, human=human, description=told, parameters=parameters)
        shown.append(texts.check_whole(what, text))
    return _INSTRUCTION.format(tools="\n\n".join(shown), names=", ".join(names))


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
    found: list[tuple[str, list[_Step]]] = []
    tools = _listed("tools", tools)
    for number, message in enumerate(_listed("messages", messages), 1):
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
            system = _content(message, number)
        elif role == "user":
            found.append(("user", [_Step(_content(message, number))]))
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
        question.text = f"{instruction(tools)}\n\nQuestion: {question.text}"
    return system, [_turn(role, steps) for role, steps in found]


def check_read(what: str, message: Mapping[str, Any], *, read: Collection[str]) -> None:
    """Raise ValueError if a message has content in a key that the caller does not read.

    what: the name of the message, for errors.
    read: the keys that the caller reads.

    Without the error the content would be lost. A key that is entirely unknown only causes a
    warning; metadata and empty values are ignored.
    """
    for key, value in message.items():
        if key in read or key in _NOTES or not given(value):
            continue
        if key in _CONTENT:
            raise ValueError(
                f"{what} has {texts.shown(key)} {texts.shown(value)}, which is not read there: "
                "leave the field out, or say it in the text"
            )
        warnings.warn(  # Python shows each distinct text once
            f"messages have {texts.shown(key)}, which is not known and not read", stacklevel=2
        )


def given(value: object) -> bool:
    """Return whether a value is more than null, NaN, false, 0, "", or nested containers of these.

    Parquet and pandas fill fields with such values where other records have more.
    """
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            left += part.values()
        elif to_list := getattr(part, "tolist", None):  # a numpy array or scalar
            left.append(to_list())
        elif isinstance(part, Iterable) and not isinstance(part, str | bytes):
            left += part
        elif part and part == part:
            return True
    return False


def _answered(steps: Sequence[_Step], message: Mapping[str, Any], *, number: int) -> None:
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
    found[0].waits, found[0].result = False, _content(message, number).strip()


def _reply(message: Mapping[str, Any], number: int, *, with_tools: bool) -> list[_Step]:
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
    text = _content(message, number, needed=not calls)
    if not calls:
        return [_Step(_ANSWER.format(text=text) if with_tools else text)]
    thought = text.strip().removeprefix("Thought:").strip()
    steps = []
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
        said = (index == 1 and thought) or f"I can use {name}."
        made = f"Thought: {said}\nAction: {name}\nAction Input: {arguments}"
        steps.append(_Step(texts.check_whole(what, made), call.get("id"), name, waits=True))
    return steps


def _function(value: object, what: str) -> Mapping[str, Any]:
    """The function in a tool or call: the value of its key "function", or the object itself."""
    function = value.get("function") if isinstance(value, Mapping) else None
    function = function if given(function) else value
    if not isinstance(function, Mapping):
        raise ValueError(f"{what} is no object that holds a function")
    return function


def _json(value: object, what: str) -> str:
    """Format a value as JSON. Raises ValueError that starts with `what`, the value's name."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # such as a date out of Parquet
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def _content(message: Mapping[str, Any], number: int, *, needed: bool = True) -> str:
    """Return the text of a message; content parts of type "text" are joined.

    number: the number of the message, from 1, for errors.
    needed: whether a null content raises ValueError; otherwise it is "".
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        found = [part.get("text") for part in parts if part.get("type") == "text"]
        content = [text for text in found if isinstance(text, str)]
        if len(content) < len(parts):
            raise ValueError(
                f'message {number} has parts that are no text: {{"type": "text", "text": ...}}'
            )
        content = "".join(content)
    if content is None and not needed:
        return ""
    if not isinstance(content, str):
        got = texts.described(content)
        raise ValueError(f"message {number} has no text in 'content', but {got}")
    return texts.check_whole(f"message {number}", content)


def _listed(name: str, values: object) -> list[Any]:
    """Return a list or other iterable of objects as a list. Raises ValueError for other values."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of objects, got {texts.described(values)}")
    return list(values)
