"""Locks a folder or file against other programs, and tells a refused program who holds the lock.

On a local disk the lock is an `flock`, which Linux forwards to an NFS server. The kernel frees it
when the process ends in any way, so a killed program leaves no stale lock. On a file system without
locks nothing is locked, and a warning says so.

In `gs://` the lock is an object that is created only if it does not exist, and rewritten every few
seconds while its program runs. If it has not been rewritten for `LEASE` seconds, its program was
killed, on whichever machine, and the next one takes the lock. A program that was merely suspended
for that long finds out when it next checks the lock.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qwen_jax.runtime import paths

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "writer.lock"
BEAT = 15.0  # seconds between two writes of a lock in gs://
_MOST_REMOVED = 100  # folders removed in a row by others before the lock's file was created in them
LEASE = 60.0  # seconds without a write, after which a lock in gs:// is stale


class Busy(ValueError):
    """Raised while another program holds the lock; the message names it and says what to do."""


@contextlib.contextmanager
def alone(
    place: Path, file: Path | None = None, *, wait: bool = False
) -> Iterator[Callable[[], None]]:
    """Lock a folder or file during the `with` block; other programs are refused meanwhile.

    place: the folder, or the file to be written.
    file: the lock's file, removed at the end; by default `writer.lock` in the folder. Its folder is
        created if missing with its parents, and what was created is removed again if left empty.
    wait: wait for the other program instead of raising (local disks only).

    Yields a function that raises Busy if another program has meanwhile taken the lock (possible in
    `gs://` only). Call it before the last write, which makes the result valid, such as a manifest.
    Raises Busy while another program, or another part of this one, holds the lock. If several
    processes share the work, only one of them takes the lock.
    """
    file = file or place / NAME
    with _object(place, file) if paths.is_remote(file) else _file(place, file, wait=wait) as check:
        yield check


@contextlib.contextmanager
def _file(place: Path, file: Path, *, wait: bool) -> Iterator[Callable[[], None]]:
    """Lock a folder or file on a local disk, by `flock`; yields a function that does nothing.

    place: the folder or file to protect, for messages.
    file: the lock's file.
    wait: whether to wait for a program that holds the lock instead of raising Busy.
    """
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    try:
        stream = _locked(place, file, wait=wait)
        try:
            yield lambda: None
        finally:
            if _is(stream, file):
                file.unlink()
            stream.close()
    finally:
        with contextlib.suppress(OSError):  # not empty, as a rule
            for folder in made:
                folder.rmdir()


def _locked(place: Path, file: Path, *, wait: bool) -> IO[str]:
    """Open and lock the lock's file, and write this process's identity into it.

    place: the folder or file that the lock protects, for messages.
    file: the lock's file.
    wait: whether to wait for a program that holds the lock.

    Returns the open file, which holds the lock until it is closed. Raises Busy if another program
    holds the lock and `wait` is False, and OSError if no file can be created there.
    """
    removed = 0
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115 (the lock lives as long as it is open)
        except FileNotFoundError:  # whoever made the folder has just removed it
            removed += 1
            if removed < _MOST_REMOVED:
                continue
            raise OSError(f"{place}: no file can be made there: choose another place") from None
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            stream.seek(0)
            text = stream.read()
            stream.close()
            raise Busy(_busy(place, _read(text))) from None
        except OSError as error:
            logging.getLogger("qwen_jax").warning(
                "%s: its disk has no locks (%s): see to it that no other program writes there",
                place,
                error.strerror or error,
            )
        except BaseException:
            stream.close()
            raise
        if _is(stream, file):  # its last holder may have removed the file after we opened it
            stream.truncate(0)
            stream.write(json.dumps(_me()))
            stream.flush()
            return stream
        stream.close()


def _is(stream: IO[str], file: Path) -> bool:
    """Whether the open file is still the file at this path, not one that has been removed."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _object(place: Path, file: Path) -> Iterator[Callable[[], None]]:
    """Lock a folder or file in Google Cloud Storage; takes over a lock whose program was killed.

    place: the folder or file to protect.
    file: the lock's object, which a thread rewrites every `BEAT` seconds.

    Yields a function that raises Busy if another program has meanwhile taken the lock.
    """
    lease = _Lease(place, file)
    while not lease.begin():
        try:
            generation, holder = paths.stamp(file)[1], _read(file.read_text(encoding="utf-8"))
        except FileNotFoundError:  # released since the attempt
            continue
        if holder.get("machine") == _machine() and isinstance(holder.get("pid"), int):
            left = not lives(holder["pid"])
        else:
            left = _expires(place, file, generation=generation, holder=holder)
        if not left:
            raise Busy(_busy(place, holder))
        paths.remove_generation(file, generation)
    beats = threading.Thread(target=lease.keep, daemon=True, name=f"lock of {place}")
    beats.start()
    try:
        yield lease.check
    finally:
        lease.over.set()
        beats.join()
        lease.end()


class _Lease:
    """A lock in `gs://`: an object that a program owns as long as it keeps rewriting it.

    over: the event that ends the rewriting.
    """

    def __init__(self, place: Path, file: Path):
        self._place, self._file = place, file
        self._content = json.dumps(_me()).encode()
        self._generation = 0
        self._writing = threading.Lock()
        self._taken_by: dict[str, Any] | None = None
        self.over = threading.Event()

    def begin(self) -> bool:
        """Create the lock's object. Returns False if another program holds the lock."""
        try:
            paths.create(self._file, self._content)
        except FileExistsError:
            if self._file_content() != self._content:
                return False  # equal content: a request was repeated, and ours succeeded first
        self._generation = paths.stamp(self._file)[1]
        return True

    def keep(self) -> None:
        """Rewrite the lock's object every `BEAT` seconds until `over` is set, in its own thread."""
        while self._taken_by is None and not self.over.wait(BEAT):
            with contextlib.suppress(Exception):  # a network error: the next write may succeed
                self._beat()

    def _beat(self) -> None:
        """Rewrite the lock's object once, or store in `_taken_by` who has taken the lock."""
        with self._writing:
            if self._taken_by is not None:
                return
            try:
                self._generation = paths.rewrite(
                    self._file, self._content, generation=self._generation
                )
            except (FileExistsError, FileNotFoundError):  # removed, taken, or a repeated request
                if not self.begin() and (other := self._file_content()) is not None:
                    self._taken_by = _read(other.decode())

    def check(self) -> None:
        """Rewrite the lock's object once; raise Busy if another program has taken the lock."""
        self._beat()
        if (other := self._taken_by) is not None:
            who = f"process {other.get('pid')} on {other.get('host')}"
            raise Busy(
                f"{self._place}: {who} has taken over, as this program gave no sign of life for "
                f"{LEASE:g} s: what it has written since does not count"
            )

    def end(self) -> None:
        """Release the lock: delete its object in the bucket, unless another program has it now."""
        with contextlib.suppress(FileNotFoundError):
            if self._file_content() == self._content:
                self._file.unlink()

    def _file_content(self) -> bytes | None:
        """Return the bytes of the lock's object, or None if there is none."""
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None


def _expires(place: Path, file: Path, *, generation: int, holder: dict[str, Any]) -> bool:
    """Wait for `LEASE` seconds; return whether a lock in `gs://` was not rewritten and so is stale.

    place: the folder or file that the lock protects, for the log.
    file: the lock's object.
    generation: the object's generation before the wait, which changes when it is rewritten.
    holder: the identity of the program that holds the lock, for the log.

    Only this machine's clock is used. A lock that is removed meanwhile counts as stale, too.
    """
    logging.getLogger("qwen_jax").warning(
        "%s: waiting up to %g s for a sign of life of process %s on %s, which began to work there "
        "at %s",
        *(place, LEASE, holder.get("pid"), holder.get("host"), holder.get("since")),
    )
    end = time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        try:
            if paths.stamp(file)[1] != generation:
                return False
        except FileNotFoundError:
            break
    return True


def lives(process: int) -> bool:
    """Return whether the process with this id still runs on this machine (or in this container)."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to someone else
        pass
    return True


def _me() -> dict[str, Any]:
    """Describe this process (host, process id, time, machine, random id) for a lock's content."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "id": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Return a name for the machine or container in which this process's id is unique.

    On Linux it is made of the boot id and the PID namespace, which differs between containers of
    one machine; elsewhere it is the host's name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _read(text: str) -> dict[str, Any]:
    """Parse a lock's content into its holder's identity; {} if the lock is only just created."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _busy(place: Path, holder: dict[str, Any]) -> str:
    """Return the message of `Busy`: which program works on `place` since when, and what to do."""
    who = "another program is at work there"
    if holder:
        since, host = holder.get("since"), holder.get("host")
        who = f"process {holder.get('pid')} on {host} has been at work there since {since}"
    return f"{place}: {who}: wait for it or stop it, or choose another place"
