"""Verdicts on kernels: the results of `auto`'s self-tests on this machine, one file each.

    $XDG_CACHE_HOME/qwen_jax/attention/KERNEL-TASK-DTYPE-DIM-TOKENS-HASH.json

A file gets its name once it is whole. Of programs that write the same file at the same time the
last one wins, as all reach the same verdict. A file that cannot be read counts as absent. This
module knows no kernels and runs no tests.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.runtime import caches, lock, paths, processes
from qwen_jax.runtime.version import VERSION

REFERENCE = "xla"  # the name with which kernels are compared
_DEATHS = 2  # a kernel is skipped after so many programs died while proving it
_SHOWN = 60  # the most characters of an error in the table


@dataclasses.dataclass(frozen=True)
class Key:
    """The conditions of a self-test. A verdict holds only where all of them are equal.

    device: jax's `device_kind`.
    jax: the version of jax.
    kernel: the kernel's name in the registry.
    task: a task of `workloads.Case`.
    dtype: the dtype of the queries.
    cache: "int8" or "int8_asymmetric"; None for keys of the queries' dtype.
    head_dim: the length H of a head.
    length: tokens, rounded up to a power of two, as blocks and speed depend on it.
    code: a digest of the kernels' source and of the measured block sizes.
    page: the tokens in a page; 0 for calls without pages.
    """

    device: str
    jax: str
    kernel: str
    task: str
    dtype: str
    cache: str | None
    head_dim: int
    length: int
    code: str
    page: int = 0

    def file(self) -> Path:
        """Return the path of the file that stores the verdict."""
        digest = hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()
        words = (self.kernel, self.task, self.cache, self.dtype, self.head_dim, self.length)
        name = "-".join(str(x) for x in words if x is not None)
        return folder() / f"{re.sub('[^A-Za-z0-9_-]', '_', name)}-{digest[:12]}.json"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a self-test.

    key: the conditions of the self-test.
    outcome: "agrees", "wrong", "refused" (an exception), "timed out", "crashed" (programs died
        during the test) or "declined" (the kernel does not support such calls; never stored).
    jaxlib, driver: the versions of jaxlib and of the runtime or driver under it.
    date: the day of the test, as YYYY-MM-DD.
    error: the largest difference from the XLA reference, over the reference's largest value.
    detail: the reason of a failure in words, such as an exception's text.
    ran: the call that was timed, in words.
    milliseconds, xla_milliseconds: per call of the kernel and of the reference, timed in turns;
        None where neither was timed, because the package has measured lines for the device.
    """

    key: Key
    outcome: str
    jaxlib: str
    driver: str
    date: str
    error: float | None = None
    detail: str = ""
    ran: str = ""
    milliseconds: float | None = None
    xla_milliseconds: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the kernel gave the results of the XLA reference."""
        return self.outcome == "agrees"

    @property
    def found(self) -> str:
        """The outcome in words, with the size of the error or the reason."""
        if self.outcome == "wrong":
            return f"wrong by {self.error:.1e} of the largest number"
        return self.outcome + (f": {self.detail}" if self.detail else "")

    def line(self) -> str:
        """Return the verdict and its conditions in one line, as a failure report needs them."""
        key = self.key
        cache = f", {key.cache} cache" if key.cache else ""
        return (
            f"qwen_jax {VERSION}; {key.device}; jax {key.jax}, jaxlib {self.jaxlib}, "
            f"{self.driver}; {key.kernel} {key.task}; {key.dtype}{cache}, head dim {key.head_dim}, "
            f"{key.length} tokens; {self.found}"
        )

    def to_json(self) -> str:
        """Return the verdict as JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))


def from_json(text: str | bytes) -> Verdict:
    """Parse a verdict from the text that `Verdict.to_json` returns.

    Raises ValueError for any other text.
    """
    try:
        fields = json.loads(text)
        verdict = Verdict(**{**fields, "key": Key(**fields["key"])})
        table([verdict])  # raises if a field that is shown has a wrong type
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no verdict: {error}") from None
    return verdict


def folder() -> Path:
    """Return the folder of the verdict files, in the user's cache."""
    return caches.own_cache("attention")


def find(key: Key) -> Verdict | None:
    """Return the stored verdict of a self-test with these conditions, or None."""
    try:
        verdict = from_json(key.file().read_bytes())
    except (OSError, ValueError):
        return None
    return verdict if verdict.key == key else None


def keep(verdict: Verdict) -> None:
    """Store a verdict. An error of the disk is ignored: the test then runs again next time."""
    with contextlib.suppress(OSError):
        paths.write(verdict.key.file(), verdict.to_json().encode())


def kept() -> list[Verdict]:
    """Return all stored verdicts that can be read, sorted by device, kernel and task."""
    found = []
    for file in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(from_json(file.read_bytes()))
    return sorted(found, key=lambda x: tuple(map(str, dataclasses.astuple(x.key))))


def forget() -> int:
    """Delete all stored verdicts, so that kernels are tested again, and return their number."""
    count = 0
    for file in list(folder().glob("*")):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            count += file.suffix == ".json"
    return count


@contextlib.contextmanager
def begun(file: Path) -> Iterator[bool]:
    """Mark on disk that this program tests a kernel, and yield whether it should.

    file: the path of the verdict, `Key.file()`.

    The mark is a file that outlives a program that dies. After `_DEATHS` of them the kernel is not
    tested again, because a compiler that aborts would otherwise end every program that starts.
    """
    prefix = f"{file.stem}.{re.sub('[^A-Za-z0-9_-]', '_', socket.gethostname())}."
    notes = [x for x in folder().glob(f"{prefix}*.begun") if not _lives(x)]
    own = folder() / f"{prefix}{os.getpid()}.begun"
    if len(notes) >= _DEATHS:
        yield False
        return
    with contextlib.suppress(OSError):
        if own in notes:  # left by an earlier program with this process id
            own.rename(own.with_name(f"{prefix}0.begun"))
        own.touch()
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _lives(note: Path) -> bool:
    """Return whether the program that left a file of `begun` is another one and still running."""
    process = int(note.suffixes[-2][1:])
    return process not in (0, os.getpid()) and lock.lives(process)


@functools.cache
def code() -> str:
    """Return a digest of the kernels' source and `measured.json`. A change voids verdicts."""
    digest = hashlib.sha256()
    here = Path(__file__).parents[1] / "kernels"
    for file in sorted((*here.glob("*.py"), *here.glob("*.json"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def driver() -> str:
    """Return the version of the runtime or driver under jax, as far as it reports one."""
    import jax

    said = str(getattr(jax.local_devices()[0].client, "platform_version", "no driver"))
    with contextlib.suppress(OSError):
        version = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        said += f" {version.splitlines()[0]}"
    return " ".join(said.split())[:200]


def milliseconds(found: Sequence[Sequence[Verdict]]) -> tuple[float, float]:
    """Return the milliseconds of a kernel and of the reference on the slowest process of each.

    found: for each process its verdicts, one for each task. Infinite where one was not timed.
    """
    own, reference = (
        max(sum(getattr(x, field) or math.inf for x in each) for each in found)
        for field in ("milliseconds", "xla_milliseconds")
    )
    return own, reference


def why(
    name: str,
    trials: Mapping[str, Sequence[Sequence[Verdict]]],
    *,
    ordered: bool,
    device: str,
) -> str:
    """Say in words why `decide` has taken the implementation `name`."""
    if name == REFERENCE:
        if not trials:
            return f"nothing that was measured on {device} is faster"
        outcomes = {x.outcome for found in trials.values() for each in found for x in each}
        if outcomes == {"declined"}:
            return "no kernel takes such calls"
        return f"no kernel is right and faster on this {device}"
    if ordered:
        return f"it is right on this {device}, and the fastest that was measured on such a device"
    own, reference = milliseconds(trials[name])
    return f"it is right on this {device}, and the fastest ({own:.4g} ms, xla {reference:.4g} ms)"


def decide(
    trials: Mapping[str, Sequence[Sequence[Verdict]]], ordered: bool
) -> tuple[str, list[tuple[str, int]]]:
    """Choose one implementation for all processes from their verdicts.

    trials: for each name, in the order of testing, each process's verdicts on the cases.
    ordered: whether the first name that is right on all processes is taken; otherwise it is the one
        whose slowest process is fastest, if it beats the XLA reference.

    Returns the name, and log lines with their levels that say why others were not taken.
    """
    best, least, notes = REFERENCE, math.inf, []
    for name, found in trials.items():
        failed = [(i, x) for i, each in enumerate(found) for x in each if not x.agrees]
        if failed:
            process, verdict = failed[0]
            notes.append(_failure(name, process, verdict=verdict, several=len(found) > 1))
            continue
        if ordered:
            return name, notes
        own, reference = milliseconds(found)
        if own >= reference:
            line = f"attention: not {name}: slower here ({own:.4g} ms, xla {reference:.4g} ms)"
            notes.append((line, logging.INFO))
        elif own < least:
            best, least = name, own
    return best, notes


def _failure(name: str, process: int, *, verdict: Verdict, several: bool) -> tuple[str, int]:
    """Return the log line for a kernel that failed or declined, and the line's level."""
    where = f" on {processes.name(process)}" if several else ""
    if verdict.outcome == "declined":
        return f"attention: not {name}{where}: {verdict.detail}", logging.INFO
    line = (
        f"attention: not {name}: its self-test has failed{where}; please send us this line: "
        f"{verdict.line()}"
    )
    return line, logging.WARNING


def table(found: Sequence[Verdict]) -> str:
    """Format verdicts as a table for people, with a heading for each device."""
    head = ("kernel", "task", "dtype", "head dim", "tokens", "found", "error", "ms", "xla ms")
    head = (*head, "jax", "date")
    lines: list[str] = []
    for device in sorted({x.key.device for x in found}):
        rows = [head, *(_cells(x) for x in found if x.key.device == device)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += [device] + [
            "  " + "  ".join(f"{x:<{n}}" for x, n in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
    return "\n".join(lines)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    """Return the text of each cell of a verdict's line in the table."""
    key = verdict.key

    def number(x: Any, form: str) -> str:
        return "-" if x is None else format(x, form)

    return (
        key.kernel,
        key.task,
        key.dtype + (f", {key.cache} cache" if key.cache else ""),
        str(key.head_dim),
        str(key.length),
        (verdict.outcome if verdict.error is not None else verdict.found)[:_SHOWN],
        number(verdict.error, ".1e"),
        number(verdict.milliseconds, ".4g"),
        number(verdict.xla_milliseconds, ".4g"),
        key.jax,
        verdict.date,
    )
