"""Reads what a model has written in ReAct's form as a message: its text, or a tool call.

`ReactParser` reads text as it arrives, and `parse_reply` a whole text with the same parser.
"""

import dataclasses
import itertools
import re

from qwen_jax.chat.formats import (
    ArgumentsDelta,
    Begins,
    Call,
    CallBegins,
    FinishReason,
    Reply,
    ReplyEnds,
    ReplyEvent,
    TextDelta,
)
from qwen_jax.chat.markers import Item, Markers
from qwen_jax.chat.react import ACTION, FINAL, INPUT, RESULT, THOUGHT

# A text without any marker is shown from its second paragraph on, or from this length: before that
# it may be a thought without its marker, which is not shown if an answer follows.
UNMARKED = 400
_PIECE = 500  # characters of a whole reply that are read at once: each part of it copies the rest
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


class PlainParser:
    """Passes text on as it is (`formats.ReplyParser`), for replies without tools."""

    over = False

    def push(self, piece: str) -> list[ReplyEvent]:
        """Add new text; return it."""
        return [TextDelta(piece)] if piece else []

    def flush(self) -> list[ReplyEvent]:
        """Return the end of the reply."""
        self.over = True
        return [ReplyEnds("stop")]


class ReactParser:
    """Turns a model's text in ReAct's form, which arrives in pieces, into events.

    begins: what the text begins with, as `formats.Prompt.begins` says.

    over: whether the reply has ended, by `Observation:` or after the arguments of a call. The rest
        is not read.
    restart: where in the content the last answer begins, if text was shown before it.

    A call is the name in the last `Action:` line before `Action Input:`, and the arguments up to
    the next marker. The thought before it is the content. Without a call, the content is what
    follows `Final Answer:`, and without that the whole text. An answer is shown as it comes, but a
    thought only once it is certain that a call follows it.
    """

    def __init__(self, begins: Begins = "reply"):
        self.over, self.restart = False, 0
        self._markers = Markers()
        self._events: list[ReplyEvent] = []
        self._text = ""  # what is neither shown nor dropped so far
        self._thought = 0 if begins == "thought" else None  # where the first thought begins
        self._action: int | None = None  # where the Action lines before the end of the text begin
        self._name = 0  # where the name in the last of them begins
        self._shows = begins == "answer"  # whether text is shown as it comes
        self._answers = begins == "answer"  # whether it is an answer, in which calls do not count
        self._calls = False  # whether it is the arguments of a call
        self._said = begins == "answer"  # whether white space is more than that before the text
        self._space = ""  # white space that is shown before the next text, and not at the end
        self._shown = 0  # characters of the content

    def push(self, piece: str) -> list[ReplyEvent]:
        """Add new text; return what is certain by now."""
        if not self.over:
            self._markers.feed(piece)
            self._read(last=False)
        return self._taken()

    def flush(self) -> list[ReplyEvent]:
        """Return the rest, as no more text comes."""
        self._read(last=True)
        self._end()
        return self._taken()

    def _taken(self) -> list[ReplyEvent]:
        events, self._events = self._events, []
        return events

    def _read(self, *, last: bool) -> None:
        while not self.over and (item := self._markers.item(last=last)) is not None:
            self._add(item)

    def _add(self, item: Item) -> None:
        if item.marker and (item.text == RESULT or self._calls):
            self._end()
            return
        if item.marker and item.text == FINAL and self._shows:
            self.restart = self._shown + len(self._space + self._text + item.text)
        if self._calls or self._answers:
            self._show(item.text)
        elif item.marker and item.text == INPUT and self._called():
            self._begin_call(self._called())
        elif item.marker and item.text == FINAL and not self._shows:
            self._text, self._shows, self._answers = "", True, True
        else:
            self._consider(item)

    def _called(self) -> str:
        """Return the name in the last Action line; "" if there is none."""
        if self._action is None:
            return ""
        return self._text[self._name :].strip().partition("\n")[0].strip()

    def _begin_call(self, name: str) -> None:
        content = self._text[self._thought or 0 : self._action]
        if self._thought is None and not self._shows:  # a model may begin with a space
            content = content.strip().removeprefix(THOUGHT)
        self._show(content)
        self._text, self._space, self._said, self._calls = "", "", False, True
        self._markers.begin_arguments()
        self._events.append(CallBegins(0, name))

    def _consider(self, item: Item) -> None:
        """Add text, or a marker that begins no call and no answer."""
        if item.marker and item.text == ACTION:
            self._action = len(self._text) if self._action is None else self._action
            self._name = len(self._text) + len(item.text)
        elif item.marker:  # what was called before it was no call
            self._action = None
        self._text += item.text
        if item.marker and item.text == THOUGHT and self._thought is None and not self._shows:
            self._thought = len(self._text)
        if not self._shows and self._thought is None and self._action is None:
            self._shows = len(self._text) > UNMARKED or bool(_BLANK_LINE.search(self._text.strip()))
        if self._shows and self._action is None:
            self._show(self._text)
            self._text = ""

    def _show(self, text: str) -> None:
        """Show text, without the white space around all of it."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if not self._said:
            shown = shown.lstrip()
            self._space = self._space if shown else ""
        if shown:
            self._said = True
            self._shown += len(shown)
            delta = ArgumentsDelta(0, shown) if self._calls else TextDelta(shown)
            if self._events and isinstance(before := self._events[-1], type(delta)):
                delta = dataclasses.replace(delta, text=before.text + shown)
                self._events.pop()
            self._events.append(delta)

    def _end(self) -> None:
        if self.over:
            return
        if not self._calls:
            self._show(self._text)
        self.over = True
        reason: FinishReason = "tool_calls" if self._calls else "stop"
        self._events.append(ReplyEnds(reason))


def parse(text: str, begins: Begins = "reply") -> Reply:
    """Read a whole reply in ReAct's form.

    begins: what the text begins with, as `formats.Prompt.begins` says.

    It is what `ReactParser` makes of the text, but for one case: where a `Final Answer:` line
    follows text that a stream has already shown, only what follows the last one is the content.
    """
    if begins == "plain":
        return Reply(text, (), "stop")
    parser = ReactParser(begins)
    pieces = (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))
    events = [*itertools.chain(*map(parser.push, pieces)), *parser.flush()]
    content = "".join(event.text for event in events if isinstance(event, TextDelta))
    arguments = "".join(event.text for event in events if isinstance(event, ArgumentsDelta))
    calls = tuple(Call(event.name, arguments) for event in events if isinstance(event, CallBegins))
    if calls:
        return Reply(content or None, calls, "tool_calls")
    if parser.restart:
        content = content[parser.restart :].strip()
    return Reply(content, (), "stop")


def parse_reply(text: str) -> tuple[str | None, list[Call]]:
    """Read a whole reply in ReAct's form as (content, calls).

    content: the text for the user; beside a call, the thought before it, or None.
    calls: pairs (name, arguments as text), at most one: Qwen was trained to wait for a result.

    A marker, such as `Action:`, counts at the start of a line. The reply ends at the first
    `Observation:`, wherever it stands. Neither a code fence nor a JSON string in the arguments
    holds markers. Names are not compared with those of any tools.
    """
    reply = parse(text)
    return reply.content, list(reply.calls)
