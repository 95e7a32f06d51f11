"""What a chat format is: how messages become a prompt, and how a model's text becomes a message.

A server knows `ChatFormat` alone, so that generations of models with other templates need no change
in it. `chatml.ChatML` is the format of first-generation Qwen.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Mode = Literal["chat", "completion", "closed"]
Begins = Literal["plain", "reply", "thought", "answer"]
FinishReason = Literal["stop", "tool_calls"]


class MessageError(ValueError):
    """A message or a tool of a request that cannot be given to the model.

    param: where it is in the request, such as "messages[2].content".
    """

    def __init__(self, param: str, problem: str):
        super().__init__(f"{param}: {problem}")
        self.param = param


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is given for a request.

    text: the prompt as text, with control tokens as they are written.
    ids: its token ids. They are put together from parts: encoding `text` may give others.
    mode: "chat" if the model begins a reply, "completion" if it continues one, "closed" if the
        prompt ends with a complete turn.
    begins: what the model's text begins with: "reply", "thought" (the prompt ends in the marker of
        a thought), "answer" (the prompt ends in an answer), or "plain" if no tools are described.
    asked: the stop texts of the request, each again without leading newlines.
    stops: all stop texts, in the order of the original server.
    stop_ids: the ids of each of `stops`, in which control tokens are recognised.
    end_ids: the ids that end every reply.
    """

    text: str
    ids: list[int]
    mode: Mode
    begins: Begins
    asked: tuple[str, ...]
    stops: tuple[str, ...]
    stop_ids: tuple[tuple[int, ...], ...]
    end_ids: tuple[int, ...]


class Call(NamedTuple):
    """A tool call of a reply: the name of the tool, and its arguments as text."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """A whole reply as a message.

    content: its text; None if it is empty and there are calls.
    calls: its tool calls.
    finish_reason: "tool_calls" or "stop".
    """

    content: str | None
    calls: tuple[Call, ...]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """More of a reply's content."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallBegins:
    """A tool call: `index` counts the calls of the reply from 0, `name` is that of the tool."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True)
class ArgumentsDelta:
    """More of the arguments of the call with this index."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class ReplyEnds:
    """Nothing more belongs to the reply; `reason` is its finish_reason."""

    reason: FinishReason


ReplyEvent = TextDelta | CallBegins | ArgumentsDelta | ReplyEnds


class ReplyParser(Protocol):
    """Turns a model's text, which arrives in pieces, into events.

    over: whether the reply has ended. What comes after is not read: generation may stop.

    However the text is cut into pieces, the joined events are the same.
    """

    @property
    def over(self) -> bool:
        """Whether the reply has ended."""
        ...

    def push(self, piece: str) -> list[ReplyEvent]:
        """Add new text; return what is certain by now."""
        ...

    def flush(self) -> list[ReplyEvent]:
        """Return the rest, as no more text comes. Its last event is ReplyEnds, unless that came."""
        ...


class ChatFormat(Protocol):
    """How messages of the OpenAI API are given to a model, and how its text is read."""

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        stop: str | Sequence[str] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_window_size: int | None = None,
    ) -> Prompt:
        """Return what the model is given. Raises MessageError.

        tools: descriptions of functions, or {"type": "function", "function": ...} around them.
        stop: the stop texts of the request, one or several.
        add_generation_prompt: whether a reply follows. Without it, and without the next, the prompt
            ends with the last message, complete.
        continue_final_message: the model continues the last message, which must be a reply.
        max_window_size: the oldest turns that make the prompt longer are left out; None keeps all.
        """
        ...

    def parser(self, begins: Begins) -> ReplyParser:
        """Return a parser for text that follows a prompt, with its `begins`."""
        ...

    def parse(self, text: str, begins: Begins) -> Reply:
        """Return a whole reply as a message."""
        ...

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        required: bool,
        names: Sequence[str] | None = None,
    ) -> str | None:
        """Return a grammar in llguidance's Lark that holds a reply from its beginning.

        tools: as for `prompt`. Arguments of those with a true `strict` are held to their schema.
        required: whether the reply must call a tool.
        names: the tools that may be called; None for all.

        Returns None if nothing is to be held. Raises MessageError.
        """
        ...
