"""What is asked of every HTTP request before a route sees it: a key, a host, a size.

Pure ASGI: a middleware that hides disconnections would keep requests of clients that have gone.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_jax.serve.refusals import Refusal, busy
from qwen_jax.serve.served import Limits, Served


class Gate:
    """An ASGI application that refuses requests before another one sees them.

    keys: those that clients may have; with none, nobody needs one.
    open_paths: the paths that need no key, the health of the server and the page among them.
    hosts: the names that the header Host may have, against web sites that direct their own name
        to this machine; None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        served: Served,
        keys: Sequence[str] = (),
        hosts: Sequence[str] | None = None,
        open_paths: Sequence[str] = (),
    ):
        self._app, self._served, self._open = app, served, frozenset(open_paths)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        counts = scope["method"] == "POST"
        self._served.answering += counts
        try:
            await self._app(scope, _Bounded(receive, self._served.limits), send)
        finally:
            self._served.answering -= counts

    def _check(self, scope: Scope) -> None:
        """Raise Refusal for a wrong host or key, a body that says that it is too long, or the end.

        Requests that have been taken are answered before the server ends.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._hosts is not None and name not in self._hosts:
            raise Refusal(403, f"this server does not answer for the host {name!r}")
        if self._keys and scope["path"] not in self._open:
            self._check_key(headers.get("authorization", ""))
        if self._served.draining and scope["method"] == "POST":
            raise busy(503, "the server is about to end", seconds=5)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._served.limits.body:
            raise too_large(self._served.limits)

    def _check_key(self, authorization: str) -> None:
        """Raise Refusal for a wrong key, after a time that tells nothing of the right ones."""
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        right = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            what = "a wrong API key" if authorization else "an API key is needed"
            raise Refusal(
                401,
                f"{what}: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


class _Bounded:
    """Receives a body up to a size, and within a time; then tells when the client goes."""

    def __init__(self, receive: Receive, limits: Limits):
        self._receive, self._limits = receive, limits
        self._size, self._whole = 0, False
        self._until = time.monotonic() + limits.body_seconds

    async def __call__(self) -> Message:
        """Receive the next message. Raises Refusal, which routes answer with."""
        if self._whole:
            return await self._receive()
        try:
            left = max(self._until - time.monotonic(), 0)
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise Refusal(408, f"the request was not sent within {seconds:g} s") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limits.body:
                raise too_large(self._limits)
        return message


def too_large(limits: Limits) -> Refusal:
    """Return the error for a body that is too large."""
    return Refusal(413, f"the request is too large: at most {limits.body} bytes")
