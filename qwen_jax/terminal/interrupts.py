"""Ctrl-C while a reply is generated: it ends the reply, not the program."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], bool]]:
    """Count Ctrl-C in a block instead of raising KeyboardInterrupt; yields whether there was one.

    The block asks between two steps of its work, so that none is torn apart. The second Ctrl-C
    raises KeyboardInterrupt as usual, for a step that takes long. Outside the main thread, and
    where SIGINT is ignored, as in a shell's background, nothing changes.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True

    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not main or before in (signal.SIG_IGN, None):
        yield lambda: pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
