"""Ends this process when another one is lost, with one line that says which one and why.

A thread asks jax every second which processes live and which have failed. When process 0 ends, a
thread of jax aborts this process; a signal handler turns the abort into the same line.
`processes.py` starts the watch thread and installs the handler.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from qwen_jax.runtime import rendezvous

FAILED = "qwen_jax/failed/"  # key prefix before a process's index; the value is the reason
SECOND = 1.0  # seconds between two queries


@dataclasses.dataclass
class Joined:
    """The state of this process as a member of a program of several processes.

    index: the index of this process.
    hosts: the host name of each process.
    coordinator: HOST:PORT of process 0.
    heartbeat_timeout: seconds without a sign of life after which a process is lost.
    client: jax's client of its coordination service.
    ending: the exit code, once this process is about to end.
    reason: why this process ends, once that is known.
    barriers, gatherings: the number of barriers and gatherings so far, which makes their keys
        unique.
    """

    index: int
    hosts: tuple[str, ...]
    coordinator: str
    heartbeat_timeout: float
    client: Any = None
    ending: int | None = None  # the exit code, once this process is about to end
    reason: str = ""  # why it ends, once that is known
    barriers: int = 0
    gatherings: int = 0

    def name(self, process: int) -> str:
        """Return the name of a process for messages, with its host. process: its index."""
        return f"process {process} ({self.hosts[process]})"


_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list[Any] = []  # keeps the handler alive, which C calls


_last_words = threading.Lock()  # held by the thread that ends the process


def look_after(me: Joined) -> None:
    """Watch the other processes, and end this one with one line if any of them fails or is lost.

    Runs in a thread of its own until the program ends, as the main thread may wait inside jax.
    """
    everyone = list(range(len(me.hosts)))
    while me.ending != 0:
        try:
            # jax answers this once all living processes (by heartbeat) have asked, so even a
            # process that has failed must go on asking until the others know.
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
    """Return the line to print when processes have reported failures: the reason of one of them.

    failures: the reported reasons, by key (`FAILED` and the index of the process).
    """
    key, reason = min(failures.items())
    return f"{me.name(int(key.removeprefix(FAILED)))} has failed: {reason}"


def lost_line(me: Joined, lost: list[int]) -> str:
    """Return the line to print when processes have died without a report. lost: their indices."""
    names = ", ".join(me.name(i) for i in lost)
    return (
        f"{names} {'has' if len(lost) == 1 else 'have'} died: its own output may say why; the same "
        "command given again continues from what was finished"
    )


def _coordinator_gone(me: Joined) -> bool:
    """Whether process 0 has stopped listening at its address; its port may close a moment late."""
    if me.index == 0:
        return False
    for _ in range(10):
        if not rendezvous.answers(me.coordinator):
            return True
        time.sleep(0.2)
    return False


def end(me: Joined, line: str, *, together: bool = False) -> NoReturn:
    """Print an error line, and end this process at once with exit code 1.

    The main thread is not waited for, as it may wait in a collective for ever.

    together: all processes live, so wait until each of them knows the reason.
    """
    if not _last_words.acquire(blocking=False):
        time.sleep(5)  # another thread is ending the process
        os._exit(1)
    say(me, line)
    if together:
        meet(me)
    elif me.index == 0:
        time.sleep(2 * SECOND)  # the service in this process must first inform the others
    os._exit(1)


def meet(me: Joined) -> bool:
    """Wait up to 3 s until all processes know of a failure; return whether they do."""
    try:
        me.client.wait_at_barrier("qwen_jax/failed", 3000)
    except Exception:
        return False
    if me.index == 0:
        time.sleep(SECOND)  # the service in this process must first answer the others
    return True


def say(me: Joined, line: str) -> None:
    """Write an error line to stderr's file descriptor, past Python's buffers."""
    moves = "tqdm" in sys.modules and me.index == 0 and os.isatty(2)  # there is a progress bar
    start = "\n" if moves else ""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = f"{start}error: {' '.join(line.split())}\n"
    with contextlib.suppress(OSError):  # a broken stderr must not keep the process from ending
        os.write(2, line.encode(encoding, "backslashreplace"))


def catch_abort(me: Joined) -> None:
    """Install a handler that prints one line when jax aborts this process.

    The coordination service ends with process 0, and jax's client in every other process then calls
    `abort()` from its own thread: there is no exception, and the watch would come too late.
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
