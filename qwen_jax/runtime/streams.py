"""Keeps stdout and stderr usable: progress and messages on a broken stderr never end a run.

stderr may be a pipe whose reader has gone, a full disk, or a terminal that was closed. stdout holds
a command's results, so that a failure to write them stays an error. Knows no messages.
"""

import contextlib
import io
import os
import sys
from typing import Any, TextIO, cast

_RAISING = ("strict", "surrogateescape", "surrogatepass")  # handlers that may raise on output


class _Lenient:
    """A text stream that drops what cannot be written, and is otherwise the stream it wraps."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lenient(stream: TextIO) -> TextIO:
    """Wrap a text stream so that writing to it never raises OSError; return it if it is wrapped."""
    return stream if isinstance(stream, _Lenient) else cast(TextIO, _Lenient(stream))


def settle() -> None:
    """Set up stdout and stderr so that printing cannot end a run.

    Characters that stdout's encoding lacks are replaced, a closed stdout or stderr is replaced by
    the null device, and what stderr cannot take is dropped. (stderr always escapes characters.)
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = lenient(sys.stderr or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _RAISING:
        sys.stdout.reconfigure(errors="replace")


def flush() -> None:
    """Flush stdout now, so that an error such as a full disk can still be reported."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard()
        error.filename = "stdout"
        raise


def discard() -> None:
    """Redirect a broken stdout to the null device: Python's own flush at exit would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
