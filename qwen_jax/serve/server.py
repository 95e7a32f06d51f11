"""Runs the application with uvicorn: signals, the end of the engine, and an orderly end."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from qwen_jax.runtime import command
from qwen_jax.serve.refusals import Refusal
from qwen_jax.serve.served import Served

_FAILURE_SECONDS = 3.0  # time for which a server whose engine has stopped still answers
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """Take a TCP port, before anything slow is done. It answers when the server runs.

    Raises OSError that names the address.
    """
    taken: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if taken is not None:
            taken.close()
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{host}:{port} cannot be served: {why}; choose another --host or --port"
        ) from None
    return taken


def address(taken: socket.socket) -> str:
    """Return the URL of a port, as a client on this machine can write it."""
    host, port = taken.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves an application until a signal or the engine ends it.

    drain_seconds: the longest time for which requests that were taken are answered after SIGTERM.

    ended_by: the signal that has ended it; None if it was the engine.
    """

    def __init__(self, app: ASGIApp, served: Served, *, drain_seconds: float):
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # not each request that is no HTTP
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,  # it would close the streams of other logs
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=2,
            )
        )
        self._served, self._drain_seconds = served, drain_seconds
        self._until = float("inf")
        self.ended_by: int | None = None

    def serve_at(self, taken: socket.socket) -> None:
        """Serve at a port that `bind` has taken, and return at the end."""
        with contextlib.suppress(ValueError, OSError):  # each connection is an open file
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.run(sockets=[taken])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at a signal. uvicorn itself would end streams, and the process by the signal."""
        loop = asyncio.get_running_loop()
        try:
            for number in _SIGNALS:
                loop.add_signal_handler(number, self.drain, number)
        except (RuntimeError, ValueError):  # in a thread, where tests run it
            yield
            return
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def raise_end(self) -> None:
        """Raise the exception that gives the process the exit code of how the server has ended."""
        if (failure := self._served.generator.failure) is not None:
            raise RuntimeError(f"the engine has stopped: {failure}")
        if self.ended_by == signal.SIGINT:
            raise KeyboardInterrupt

    def drain(self, number: int) -> None:
        """Refuse new requests, and end when those that were taken are answered; now, if again."""
        if self._served.draining:
            self._until = 0
            return
        self.ended_by = number
        self._served.draining = True
        self._until = time.monotonic() + self._drain_seconds
        if count := self._served.answering:
            command.say(
                f"ending: {count} requests are answered first, for at most "
                f"{self._drain_seconds:g} s; a second signal ends them"
            )

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends now; uvicorn asks ten times a second."""
        if self._served.generator.failure is not None and self._until == float("inf"):
            self._until = time.monotonic() + _FAILURE_SECONDS
        if time.monotonic() >= self._until:
            if self._served.desk is not None:
                self._served.desk.fail(Refusal(503, "the server has ended"))
            self.should_exit = True
        if self._served.draining and not self._served.answering:
            self.should_exit = True
        return await super().on_tick(counter)
