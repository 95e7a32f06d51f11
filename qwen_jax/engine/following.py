"""Runs one engine on several processes: process 0 tells the others each call of its programs.

The scheduler and all requests are on process 0. Before it calls a method of `Steps`, it sends the
method's name and arguments over TCP to the other processes, which call the same: a few kilobytes a
step. The connections prove themselves by a secret that jax's coordination service passes on.
"""

import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from qwen_jax.engine.steps import Steps
from qwen_jax.model import Decoder
from qwen_jax.runtime import processes, rendezvous

_Value: TypeAlias = np.ndarray | np.generic | int | None
_END = "end"
_INDEX = 4  # bytes of a process's index
_WAIT = 300.0  # seconds until all processes are connected
_GONE = "process 0 has closed the connection"
_GREETING = 5.0  # seconds for a process to say who it is
_STUCK = 60.0  # seconds after which a process that reads nothing counts as lost


class Leader(Steps):
    """The programs as process 0 calls them, which has the other processes call them, too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lines = _accept(processes.count() - 1)

    def check(self, decoder: Decoder) -> None:
        """Refuse other weights, which this process cannot give to the others."""
        raise NotImplementedError("an engine of several processes takes no other weights")

    def admit(self, row: int, vector: np.ndarray) -> None:
        """See `Steps`."""
        self._send("admit", {"row": row, "vector": vector})
        super().admit(row, vector)

    def masks(self, which: np.ndarray, masks: np.ndarray) -> None:
        """See `Steps`."""
        self._send("masks", {"which": which, "masks": masks})
        super().masks(which, masks)

    def decode(self, orders: np.ndarray) -> Any:
        """See `Steps`."""
        self._send("decode", {"orders": orders})
        return super().decode(orders)

    def prefill(self, tokens: np.ndarray, **arrays: Any) -> Any:
        """See `Steps`."""
        self._send("prefill", {"tokens": tokens, **arrays})
        return super().prefill(tokens, **arrays)

    def close(self) -> None:
        """Let the other processes return from `follow`, those that are still there."""
        with contextlib.suppress(ConnectionError):
            self._send(_END, {})
        for line in self._lines.values():
            line.close()

    def _send(self, name: str, arguments: Mapping[str, _Value]) -> None:
        """Tell the other processes a call. Raises ConnectionError that names one that is gone."""
        message, lost = _encoded(name, arguments), []
        for process, line in self._lines.items():
            try:
                line.sendall(message)
            except OSError:
                lost.append(processes.name(process))
        if lost:
            raise ConnectionError(f"{', '.join(lost)} died or hangs: its own output may say why")


def follow(steps: Steps) -> None:
    """Call what process 0 calls, until it closes its engine. For the other processes.

    Raises ConnectionError if process 0 is gone without a word.
    """
    host, port, secret = json.loads(processes.gather("")[0])
    try:
        line = socket.create_connection((host, port), _WAIT)
    except OSError as error:
        raise ConnectionError(
            f"process 0 cannot be reached at {host}:{port} ({error.strerror or error}): processes "
            "of an engine need all ports between them"
        ) from None
    with line, line.makefile("rb") as stream:
        line.settimeout(None)
        line.sendall(bytes.fromhex(secret) + processes.index().to_bytes(_INDEX))
        while (head := stream.readline()).endswith(b"\n"):
            name, kinds = json.loads(head)
            if name == _END:
                return
            arguments = {}
            for key, (dtype, shape) in kinds.items():
                if dtype is None:
                    arguments[key] = None
                    continue
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                if len(data := stream.read(size)) < size:
                    raise ConnectionError(_GONE)
                arguments[key] = np.frombuffer(data, dtype).reshape(shape)
            getattr(steps, name)(**arguments)
    raise ConnectionError(_GONE)


def _encoded(name: str, arguments: Mapping[str, _Value]) -> bytes:
    """Return a call as bytes: a line of JSON with dtypes and shapes, then the arrays."""
    arrays = {key: None if x is None else np.asarray(x) for key, x in arguments.items()}
    kinds = {
        key: (None, None) if x is None else (x.dtype.str, x.shape) for key, x in arrays.items()
    }
    parts = [json.dumps((name, kinds)).encode(), b"\n"]
    parts += [x.tobytes() for x in arrays.values() if x is not None]
    return b"".join(parts)


def _accept(count: int) -> dict[int, socket.socket]:
    """Wait for the other processes to connect, and return their connections by their indices.

    count: how many there are. Raises ConnectionError that names those that have not connected.
    """
    secret = secrets.token_bytes(32)
    with rendezvous.server(0) as server:
        port = server.getsockname()[1]
        processes.gather(json.dumps((processes.first_host(), port, secret.hex())))
        lines: dict[int, socket.socket] = {}
        until = time.monotonic() + _WAIT
        while len(lines) < count:
            server.settimeout(max(0.0, until - time.monotonic()))
            try:
                line, _ = server.accept()
            except (TimeoutError, BlockingIOError):
                missing = [processes.name(i) for i in range(1, count + 1) if i not in lines]
                for line in lines.values():
                    line.close()
                raise ConnectionError(
                    f"{', '.join(missing)} did not connect to port {port} of process 0 within "
                    f"{_WAIT:g} s"
                ) from None
            if (index := _introduced(line, secret)) is None:
                line.close()  # no process of this program
                continue
            line.settimeout(_STUCK)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lines[index] = line
    return lines


def _introduced(line: socket.socket, secret: bytes) -> int | None:
    """Read who has connected: return the process's index, or None for one without the secret."""
    given, size = b"", len(secret) + _INDEX
    with contextlib.suppress(OSError):
        line.settimeout(_GREETING)
        while len(given) < size and (part := line.recv(size - len(given))):
            given += part
    if len(given) < size or not hmac.compare_digest(given[: len(secret)], secret):
        return None
    return int.from_bytes(given[len(secret) :])
