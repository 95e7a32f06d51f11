"""What a process does when another is lost: it ends, and says in one line which one and why.

A thread asks jax each second who lives and who has failed. The end of process 0 comes as an abort
from a thread of jax's, which a handler puts into the same words. `processes.py` starts both.
"""

import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from qwen_jax.runtime import rendezvous

FAILED = "qwen_jax/failed/"  # key: process, value: what it ended with
SECOND = 1.0  # between two looks at the others


@dataclasses.dataclass
class Joined:
    """What this process knows of the others. client: jax's, to its coordination service."""

    index: int
    hosts: tuple[str, ...]
    coordinator: str
    heartbeat_timeout: float
    client: Any = None
    ending: int | None = None  # the exit code, once this process is about to end
    reason: str = ""  # why, while that has not been said
    barriers: int = 0
    gatherings: int = 0

    def name(self, process: int) -> str:
        return f"process {process} ({self.hosts[process]})"


_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list[Any] = []  # the handler, which C calls


_last_words = threading.Lock()  # taken by the thread that ends the process


def look_after(me: Joined) -> None:
    """Look after the others until the end. A thread of its own, as the program waits in jax."""
    everyone = list(range(len(me.hosts)))
    while me.ending != 0:
        try:
            # jax knows by heartbeats who lives, and answers when all who do have asked: so even a
            # process that has failed goes on asking, until the others know.
            living = me.client.get_live_nodes(everyone)
            failures = dict(me.client.key_value_dir_get(FAILED))
        except Exception as error:
            if me.ending is not None:
                return
            if _coordinator_gone(me):
                end(me, lost_line(me, [0]))
            end(me, f"jax's coordination service does not answer: {error}")
        failures.pop(f"{FAILED}{me.index}", None)
        lost = [i for i in everyone if i not in living]
        if me.ending is None and failures:
            end(me, _reason(me, failures), together=True)
        if me.ending is None and lost:
            end(me, lost_line(me, lost))
        time.sleep(SECOND)


def _reason(me: Joined, failures: dict[str, str]) -> str:
    key, reason = min(failures.items())
    return f"{me.name(int(key.removeprefix(FAILED)))} has failed: {reason}"


def lost_line(me: Joined, lost: list[int]) -> str:
    names = ", ".join(me.name(i) for i in lost)
    return (
        f"{names} {'has' if len(lost) == 1 else 'have'} died: its own output may say why; the same "
        "command given again continues from what was finished"
    )


def _coordinator_gone(me: Joined) -> bool:
    """Whether nothing listens for process 0 any more; its system takes a moment to clear up."""
    if me.index == 0:
        return False
    for _ in range(10):
        if not rendezvous.answers(me.coordinator):
            return True
        time.sleep(0.2)
    return False


def end(me: Joined, line: str, together: bool = False) -> NoReturn:
    """End this process at once: its main thread may wait for ever in a collective.

    together: all live, and wait until every one has heard.
    """
    if not _last_words.acquire(blocking=False):
        time.sleep(5)  # another thread is at it
        os._exit(1)
    say(me, line)
    if together:
        meet(me)
    elif me.index == 0:
        time.sleep(2 * SECOND)  # the others hear through the service, which lives here
    os._exit(1)


def meet(me: Joined) -> bool:
    """Wait a little for all to know of a failure; whether they do."""
    try:
        me.client.wait_at_barrier("qwen_jax/failed", 3000)
    except Exception:
        return False
    if me.index == 0:
        time.sleep(SECOND)  # the others have their answer from the service, which lives here
    return True


def say(me: Joined, line: str) -> None:
    start = "\n" if "tqdm" in sys.modules and me.index == 0 else ""  # off the line of a bar
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = f"{start}error: {' '.join(line.split())}\n"
    os.write(2, line.encode(encoding, "backslashreplace"))


def catch_abort(me: Joined) -> None:
    """One line instead of an abort.

    When process 0 goes, its coordination service goes with it, and jax's client in every other
    process calls `abort()` from a thread of its own: no exception, and too soon for any watching.
    """

    def aborted(number: int) -> None:
        if me.ending is not None:
            if me.reason:
                say(me, me.reason)
            os._exit(me.ending)
        if _coordinator_gone(me):
            end(me, lost_line(me, [0]))
        if me.client is None:
            end(me, "jax could not join the processes: one of them has ended meanwhile")
        end(
            me,
            f"the runtime has aborted {me.name(me.index)}: with TF_CPP_MIN_LOG_LEVEL=0 in the "
            "environment it says why",
        )

    handler = _SIGNAL_HANDLER(aborted)
    _kept.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _SIGNAL_HANDLER)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)
