"""What `auto` has found out about kernels on this machine, kept between runs: a file a verdict.

    $XDG_CACHE_HOME/qwen_jax/attention/KERNEL-TASK-DTYPE-DIM-TOKENS-HASH.json

A file has its name when it is whole, and the last writer wins: programs at the same time find out
the same. What cannot be read counts as not found out yet. Knows no kernels and runs nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.runtime import caches, lock, paths
from qwen_jax.runtime.version import VERSION

_DEATHS = 2  # of programs, while they proved a kernel, after which it is left alone
_SHOWN = 60  # characters of an error in the table


@dataclasses.dataclass(frozen=True)
class Key:
    """What a kernel was proved for: a verdict holds for equal values of all of these alone.

    device: jax's `device_kind`. task: "forward", "backward" or "decode". dtype: of the queries;
    cache: "int8" or "int8_asymmetric", None for keys of that dtype. length: tokens, rounded up to a
    power of two: blocks and speed depend on it. code: a digest of the kernels' source and measured
    blocks.
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

    def file(self) -> Path:
        """Where the verdict is kept."""
        digest = hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()
        words = (self.kernel, self.task, self.cache, self.dtype, self.head_dim, self.length)
        name = "-".join(str(x) for x in words if x is not None)
        return folder() / f"{re.sub('[^A-Za-z0-9_-]', '_', name)}-{digest[:12]}.json"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a self-test found. outcome: "agrees", "wrong", "refused" (an exception), "timed out",
    "crashed" (programs died of it) or "declined" (it is not for such calls; never kept).

    error: the worst difference from the reference over the largest number. detail: of an exception.
    ran: the call that was timed. milliseconds: of a call; xla_milliseconds: of the reference's, in
    turns with it. None: not timed, because the package has measured lines for the device.
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
        return self.outcome == "agrees"

    @property
    def found(self) -> str:
        """The outcome in words."""
        if self.outcome == "wrong":
            return f"wrong by {self.error:.1e} of the largest number"
        return self.outcome + (f": {self.detail}" if self.detail else "")

    def line(self) -> str:
        """All that a report of a failure must say, in one line."""
        key = self.key
        cache = f", {key.cache} cache" if key.cache else ""
        return (
            f"qwen_jax {VERSION}; {key.device}; jax {key.jax}, jaxlib {self.jaxlib}, "
            f"{self.driver}; {key.kernel} {key.task}; {key.dtype}{cache}, head dim {key.head_dim}, "
            f"{key.length} tokens; {self.found}"
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def from_json(text: str | bytes) -> Verdict:
    """The inverse of `Verdict.to_json`. ValueError for anything else."""
    try:
        fields = json.loads(text)
        verdict = Verdict(**{**fields, "key": Key(**fields["key"])})
        table([verdict])  # its fields are of the right types, as far as they are shown
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no verdict: {error}") from None
    return verdict


def folder() -> Path:
    """Where verdicts are kept."""
    return caches.own_cache("attention")


def find(key: Key) -> Verdict | None:
    """The verdict that is kept, if any."""
    try:
        verdict = from_json(key.file().read_bytes())
    except (OSError, ValueError):
        return None
    return verdict if verdict.key == key else None


def keep(verdict: Verdict) -> None:
    """Write a verdict; nothing where it cannot be written: it is found out again."""
    with contextlib.suppress(OSError):
        paths.write(verdict.key.file(), verdict.to_json().encode())


def kept() -> list[Verdict]:
    """All that can be read, by device, kernel and task."""
    found = []
    for file in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(from_json(file.read_bytes()))
    return sorted(found, key=lambda x: tuple(map(str, dataclasses.astuple(x.key))))


def forget() -> int:
    """Remove all verdicts, so that kernels are proved anew; how many there were."""
    count = 0
    for file in list(folder().glob("*")):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            count += file.suffix == ".json"
    return count


@contextlib.contextmanager
def begun(key: Key) -> Iterator[bool]:
    """Note that this program is proving a kernel, as long as it is. Whether it should: not where
    programs have died doing it, for a compiler that aborts would end every program that starts.
    """
    prefix = f"{key.file().stem}.{re.sub('[^A-Za-z0-9_-]', '_', socket.gethostname())}."
    notes = [x for x in folder().glob(f"{prefix}*.begun") if not _lives(x)]
    own = folder() / f"{prefix}{os.getpid()}.begun"
    if len(notes) >= _DEATHS:
        yield False
        return
    with contextlib.suppress(OSError):
        if own in notes:  # of an earlier program with this number
            own.rename(own.with_name(f"{prefix}0.begun"))
        own.touch()
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _lives(note: Path) -> bool:
    """Whether the program that has left a note still runs, and is another one."""
    process = int(note.suffixes[-2][1:])
    return process not in (0, os.getpid()) and lock.lives(process)


@functools.cache
def code() -> str:
    """A digest of the kernels: with other source, or other measured blocks, they are others."""
    digest = hashlib.sha256()
    here = Path(__file__).parents[1] / "kernels"
    for file in sorted((*here.glob("*.py"), *here.glob("*.json"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def driver() -> str:
    """The runtime or driver under jax, as far as it names itself."""
    import jax

    said = str(getattr(jax.local_devices()[0].client, "platform_version", "no driver"))
    with contextlib.suppress(OSError):
        version = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        said += f" {version.splitlines()[0]}"
    return " ".join(said.split())[:200]


def table(found: Sequence[Verdict]) -> str:
    """Verdicts for people, under a heading for each device."""
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
