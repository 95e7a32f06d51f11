"""One program at a time in a place where programs write: the others learn who is at work there.

On a disk the kernel holds the lock (`flock`, which Linux hands on to the server of an NFS) and
frees it when its process ends, however it ends: a lock that a killed program left locks nobody out.
Where a file system has no locks there is none, and a line says so.

In `gs://` the lock is an object that is made only if there is none, and written again every few
seconds while its program lives. One that has not been written for `LEASE` was left behind by a
program that was killed, wherever it ran, and the next one takes its place. A program that was only
halted for so long learns that when it next asks whether it may still write.
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
BEAT = 15.0  # seconds between two signs of life in gs://
LEASE = 60.0  # seconds without one, after which a lock there was left behind


class Busy(ValueError):
    """Another program is at work there; the message says which, since when, and what to do."""


@contextlib.contextmanager
def alone(
    place: Path, file: Path | None = None, wait: bool = False
) -> Iterator[Callable[[], None]]:
    """Work in a place while every other program that asks for its lock is refused.

    Yields a function to be called before a file is written that makes what was written count: it
    raises Busy where another program has taken the place meanwhile, which happens in `gs://` alone.

    place: a folder, or a file that is to be written. file: the lock's, which goes at the end; None:
    `writer.lock` in the folder. Its folder is made where it is not there, and removed again where
    it is left empty. wait: until the other program is done, instead of being refused; on disks
    alone. Of several processes that share the work, one takes the lock.

    Raises Busy while another program, or another part of this one, is at work there.
    """
    file = file or place / NAME
    with _object(place, file) if paths.is_remote(file) else _file(place, file, wait) as check:
        yield check


@contextlib.contextmanager
def _file(place: Path, file: Path, wait: bool) -> Iterator[Callable[[], None]]:
    made = not file.parent.exists()
    try:
        stream = _locked(place, file, wait)
        try:
            yield lambda: None
        finally:
            if _is(stream, file):
                file.unlink()
            stream.close()
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty, as a rule
                file.parent.rmdir()


def _locked(place: Path, file: Path, wait: bool) -> IO[str]:
    """The lock's file, open and locked, with the name of this process in it."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115 (the lock lives as long as it is open)
        except FileNotFoundError:  # whoever made the folder has just removed it
            continue
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
        if _is(stream, file):  # not one that its holder has removed meanwhile
            stream.truncate(0)
            stream.write(json.dumps(_me()))
            stream.flush()
            return stream
        stream.close()


def _is(stream: IO[str], file: Path) -> bool:
    """Whether this open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _object(place: Path, file: Path) -> Iterator[Callable[[], None]]:
    lease = _Lease(place, file)
    while not lease.begin():
        try:
            generation, holder = paths.stamp(file)[1], _read(file.read_text(encoding="utf-8"))
        except FileNotFoundError:  # gone meanwhile
            continue
        if holder.get("machine") == _machine() and isinstance(holder.get("pid"), int):
            left = not lives(holder["pid"])
        else:
            left = _expires(place, file, generation, holder)
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
    """A lock that is an object: this program's, as long as it is written again and again."""

    def __init__(self, place: Path, file: Path):
        self._place, self._file = place, file
        self._content = json.dumps(_me()).encode()
        self._generation = 0
        self._writing = threading.Lock()
        self._taken_by: dict[str, Any] | None = None
        self.over = threading.Event()

    def begin(self) -> bool:
        """Write the lock, unless there is one."""
        try:
            paths.create(self._file, self._content)
        except FileExistsError:
            if self._file_content() != self._content:
                return False  # else made after all, by a request that was sent twice
        self._generation = paths.stamp(self._file)[1]
        return True

    def keep(self) -> None:
        """Write it again and again; a thread of its own."""
        while self._taken_by is None and not self.over.wait(BEAT):
            with contextlib.suppress(Exception):  # the network's: the next one may arrive
                self._beat()

    def _beat(self) -> None:
        with self._writing:
            if self._taken_by is not None:
                return
            try:
                self._generation = paths.rewrite(self._file, self._content, self._generation)
            except (FileExistsError, FileNotFoundError):  # removed, taken, or a request sent twice
                if not self.begin() and (other := self._file_content()) is not None:
                    self._taken_by = _read(other.decode())

    def check(self) -> None:
        self._beat()
        if (other := self._taken_by) is not None:
            who = f"process {other.get('pid')} on {other.get('host')}"
            raise Busy(
                f"{self._place}: {who} has taken over, as this program gave no sign of life for "
                f"{LEASE:g} s: what it has written since does not count"
            )

    def end(self) -> None:
        """Remove the lock, if it is still this program's."""
        with contextlib.suppress(FileNotFoundError):
            if self._file_content() == self._content:
                self._file.unlink()

    def _file_content(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None


def _expires(place: Path, file: Path, generation: int, holder: dict[str, Any]) -> bool:
    """Whether a lock is not written again, nor removed, for as long as a lease. No clock but our
    own has a part in it.
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
    """Whether a process of this machine, and of its numbering, still runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to someone else
        pass
    return True


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "id": uuid.uuid4().hex,
    }


def _machine() -> str:
    """What tells apart machines, and containers of one, whose processes have numbers of their own:
    of Linux the boot and the namespace of processes, elsewhere the name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _read(text: str) -> dict[str, Any]:
    """What a lock says of its holder; {} of one that is just being written."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _busy(place: Path, holder: dict[str, Any]) -> str:
    who = "another program is at work there"
    if holder:
        since, host = holder.get("since"), holder.get("host")
        who = f"process {holder.get('pid')} on {host} has been at work there since {since}"
    return f"{place}: {who}: wait for it or stop it, or choose another place"
