"""Shows one reply as it grows, and measures it."""

import contextlib
import dataclasses
import time
from collections.abc import Generator

from qwen_jax.generate import results
from qwen_jax.runtime import errors
from qwen_jax.terminal import interrupts
from qwen_jax.terminal.replies import Asked, Piece, Replies
from qwen_jax.terminal.screens import Screen


class DroppedError(Exception):
    """Raised for a reply that is not kept. Its text says why; its cause is the model's error."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole reply.

    text: without the white space around it.
    report: its number of tokens and its speed, in words.
    """

    text: str
    report: str


def answer(replies: Replies, screen: Screen, asked: Asked) -> Answer:
    """Show the reply to a question as it grows, and return it.

    Raises DroppedError after Ctrl-C, and for an error of the model, such as a prompt that is too
    long.
    """
    started, whole, ended = time.perf_counter(), "", None
    times: list[tuple[float, int]] = []
    shown = 0  # characters of the reply without the white space around it
    try:
        with interrupts.counted() as interrupted, contextlib.closing(_all(replies, asked)) as all_:
            screen.begin_reply()
            for piece in all_:
                if interrupted():
                    raise KeyboardInterrupt
                if piece.tokens:
                    times.append((time.perf_counter(), piece.tokens))
                whole, ended = whole + piece.text, piece.ended
                # White space at the end is held back: at the reply's end it is none of it.
                text = whole.strip()
                if len(text) > shown:
                    screen.piece(text[shown:])
                    shown = len(text)
    except KeyboardInterrupt:
        raise DroppedError("stopped: this question and its reply are not kept") from None
    finally:
        screen.end_reply()
    limit = asked.settings.given["max_new_tokens"] if ended == "length" else None
    report = _report(times, started, limit=limit)
    return Answer(whole.strip(), f"[{report}]" if whole.strip() else f"[empty reply; {report}]")


def _all(replies: Replies, asked: Asked) -> Generator[Piece, None, None]:
    """Yield the pieces of a reply; the model's errors become DroppedError."""
    try:
        yield from replies.stream(asked)
    except Exception as error:
        advice = ("max_length", "cache_dtype", "mesh")  # options that save memory
        raise DroppedError(f"error: {errors.explain(error, advice)}") from error


def _report(times: list[tuple[float, int]], started: float, *, limit: int | None) -> str:
    """Say how many tokens a reply has, when the first came, and how fast the others.

    times: pairs (time in s, number of tokens) of the pieces.
    started: the time of the question, in s.
    limit: max_new_tokens, if the reply was cut off by it or by the model's length.
    """
    if not times:
        return "no token"
    tokens, first = sum(count for _, count in times), times[0][0] - started
    said = f"{tokens} token{'s' if tokens > 1 else ''}, the first after {first:.2f} s"
    said += f", {results.rate(times) or '-'} tokens/s"
    if limit is None:
        return said
    return f"{said}; cut off by {'max_new_tokens' if tokens == limit else 'max_length'}"
