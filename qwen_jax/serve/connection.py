"""The connection to a client: streams of events, and clients that go away or do not read."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from qwen_jax.serve.refusals import Refusal, mistake
from qwen_jax.serve.served import Limits

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")
DONE = b"data: [DONE]\n\n"


def event(payload: object) -> bytes:
    """Format a payload as an event of a stream: a line of JSON, and an empty line."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class EventStream(EventSourceResponse):
    """The answer that is a stream of events, with comments that keep a silent connection alive.

    events: the events as bytes. A Refusal becomes an event with the error.
    close: is called when the stream is over, or nobody reads it any more, in any case once.
    """

    def __init__(self, events: AsyncIterator[bytes], *, close: Callable[[], None], limits: Limits):
        super().__init__(
            _with_errors(events),
            sep="\n",
            ping=limits.ping_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=limits.send_seconds,
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _LOG.warning("a client does not read its stream, which is given up")
        finally:
            self._close()


async def _with_errors(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield events, and an error in the middle as an event, which clients raise as an exception."""
    try:
        async for piece in events:
            yield piece
    except Refusal as refusal:
        yield event(refusal.body())
    except Exception as error:
        yield event(mistake(error).body())
    yield DONE


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of some work for a request, which ends when its client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refusal(400, "the client has gone")  # nobody reads this
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Return when the client of a request has gone. Its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
