"""The progress of long work on stderr: a moving bar on a terminal, and a line now and then in a
pipe or a file, where every state of a bar would be kept. A stderr that breaks ends the display, not
the work.
"""

import sys
import time
from typing import Any

from tqdm import tqdm

from qwen_jax.runtime import streams

EVERY = 30.0  # seconds between two lines, but for the last


def bar(iterable: Any = None, **settings: Any) -> tqdm:
    """Make a progress bar; the arguments are tqdm's.

    If stderr is no terminal, whole lines are printed: the state after `EVERY` seconds, after twice
    that, and so on, and the last one, unless `leave` is False. Without `total`, the first is
    printed at once, since it says what is being waited for.
    """
    stream = streams.lenient(sys.stderr)
    if not stream.isatty():
        known = settings.get("total") is not None or hasattr(iterable, "__len__")
        settings |= {"file": _Lines(first=EVERY if known else 0.0), "position": 0}
    return tqdm(iterable, **{"mininterval": 0.5, "file": stream, **settings})


class _Lines:
    """The stream that tqdm draws a bar on: it prints some of the bar's states on stderr as lines.

    first: seconds after which the first one is printed.

    tqdm writes a carriage return before each state, blanks to delete the bar, and a newline after
    its last state.
    """

    def __init__(self, first: float):
        self._due = time.monotonic() + first
        self._state = ""  # not printed yet

    def write(self, text: str) -> int:
        """Take a piece of the bar's output, and print its state when that is due."""
        ends = text == "\n"
        if not ends and text.strip("\r"):
            self._state = text.strip()
        if self._state and (ends or time.monotonic() >= self._due):
            print(self._state, file=streams.lenient(sys.stderr), flush=True)
            self._state, self._due = "", time.monotonic() + EVERY
        return len(text)
