"""One program at a time in a place where programs write: the others learn who is at work there.

On a disk the kernel holds the lock (`flock`, which Linux hands on to the server of an NFS) and
frees it when its process ends, however it ends: a lock that a killed program left locks nobody out.
Where a file system has no locks there is none, and a line says so. In `gs://` the lock is an object
that is made only if there is none. It counts as left behind when its process was one of this
machine and is gone; of another machine nobody can tell, and the error says how to remove it.
"""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qwen_jax import paths

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "writer.lock"


class Busy(ValueError):
    """Another program is at work there; the message says which, since when, and what to do."""


@contextlib.contextmanager
def alone(place: Path, file: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Work in a place while every other program that asks for its lock is refused.

    place: a folder, or a file that is to be written. file: the lock's, which goes at the end; None:
    `writer.lock` in the folder. Its folder is made where it is not there, and removed again where
    it is left empty. wait: until the other program is done, instead of being refused; on disks
    alone. Of several processes that share the work, one takes the lock.

    Raises Busy while another program, or another part of this one, is at work there.
    """
    file = file or place / NAME
    with _object(place, file) if paths.is_remote(file) else _file(place, file, wait):
        yield


@contextlib.contextmanager
def _file(place: Path, file: Path, wait: bool) -> Iterator[None]:
    made = not file.parent.exists()
    try:
        stream = _locked(place, file, wait)
        try:
            yield
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
def _object(place: Path, file: Path) -> Iterator[None]:
    mine = json.dumps(_me()).encode()
    while not _created(file, mine):
        try:
            generation, text = paths.stamp(file)[1], file.read_text(encoding="utf-8")
        except FileNotFoundError:  # gone meanwhile
            continue
        if text.encode() == mine:  # made after all, by a request that was sent twice
            break
        if not _is_left(holder := _read(text)):
            remove = f"if it no longer runs, remove its lock: gcloud storage rm {file}"
            raise Busy(f"{_busy(place, holder)}; {remove}")
        paths.remove_generation(file, generation)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if file.read_bytes() == mine:
                file.unlink()


def _created(file: Path, content: bytes) -> bool:
    try:
        paths.create(file, content)
    except FileExistsError:
        return False
    return True


def _is_left(holder: dict[str, Any]) -> bool:
    """Whether the lock's process was one of this machine, and is no more."""
    if holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to someone else
        pass
    return False


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
