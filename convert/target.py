"""What both converters do around the copying: the folder written to.

A target in work holds `unfinished.json`, which says what is being made of what. The same command
finds it and continues; another one is refused. It goes when the target is complete. While a command
is at work in it, any other is refused (`alone`), the same one too.
"""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint.directory import (
    MANIFEST,
    UNFINISHED,
    carry,
    names,
    remove_drafts,
    write_json,
)
from qwen_jax.runtime import command, lock, paths, processes
from qwen_jax.runtime.texts import read_json


def check_apart(source: Path, target: Path) -> None:
    """Raise UsageError when one folder is the other, or is within it; ValueError for a target of a
    name that not everybody could open.
    """
    paths.check_name(target)
    source, target = (p if paths.is_remote(p) else p.resolve() for p in (source, target))
    if source == target or source in target.parents:
        raise command.UsageError(f"DST {target} is within SRC {source}: choose another place")


def is_unfinished(target: Path) -> bool:
    return (target / UNFINISHED).exists()


@contextmanager
def alone(target: Path) -> Iterator[Callable[[], None]]:
    """With no other program at work in `target`; of several processes the first speaks for all.

    Yields what `lock.alone` does. Raises ValueError for what is no folder, or a finished directory,
    and `lock.Busy`.
    """
    if processes.index():
        yield lambda: None
        return
    _check_unfinished(target)
    try:
        with lock.alone(target) as check:
            yield check
    except lock.Busy as error:
        hint = "processes that share one conversion take --distributed"
        raise lock.Busy(f"{error} ({hint})") from None


def _check_unfinished(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is not a folder: choose another place")
    if (target / MANIFEST).exists():
        raise ValueError(
            f"{target} is a finished model directory: choose another place, or add --verify to "
            "compare it with its source"
        )


def check_usable(target: Path, facts: Mapping[str, Any]) -> bool:
    """Whether `target` holds unfinished work of the same command; writes nothing.

    Raises ValueError when it holds anything else.
    """
    _check_unfinished(target)
    if not is_unfinished(target):
        if names(target):
            raise ValueError(
                f"{target} exists and is neither empty nor unfinished work of this command: choose "
                "another place, or remove it"
            )
        return False
    begun = read_json(target / UNFINISHED)
    if different := [key for key, value in facts.items() if begun.get(key) != value]:
        told = [f"{key} was {begun.get(key)!r}" for key in different if key != "source"]
        told += ["the source was another or has changed"] if "source" in different else []
        raise ValueError(
            f"{target} is the unfinished work of another command ({', '.join(told)}): give that "
            "one again, or remove the folder"
        )
    return True


def check_shared(target: Path, facts: Mapping[str, Any]) -> None:
    """Raise ValueError unless this is the folder that process 0 has begun."""
    if not is_unfinished(target):
        raise ValueError(
            f"{target} is not the folder that process 0 writes to: all hosts need one disk, or gs://"
        )
    check_usable(target, facts)


def check_space(target: Path, needed: int) -> None:
    """Raise ValueError when the disk of `target` has no room for `needed` bytes more."""
    if paths.is_remote(target):
        return
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{target} needs {command.size(needed)} more on a disk that has {command.size(free)} "
            "free: free some space or choose another place"
        )


def begin(
    source: Path, target: Path, *, facts: Mapping[str, Any], resumed: bool, done: int, needed: int
) -> None:
    """Start or continue: say how many bytes are there, and write all but weights and config.json.

    Raises ValueError when the `needed` bytes have no room.
    """
    remove_drafts(target)
    check_space(target, needed)
    if resumed:
        command.say(f"continuing: {command.size(done)} of {command.size(done + needed)} are there")
    with explained(target, needed):
        paths.make_folder(target)
        write_json(target / UNFINISHED, facts)
        carry(source, target)


def end(target: Path) -> None:
    (target / UNFINISHED).unlink()


@contextmanager
def explained(target: Path, needed: int) -> Iterator[None]:
    """Say what to do when the disk fills up after all."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of {target} is full; up to {command.size(needed)} were needed: free some "
            "space and give the same command again, it continues"
        ) from error


def fingerprint(files: Iterable[Path]) -> dict[str, list[int]]:
    """What tells whether the source is still the same: its files' names, sizes and times."""
    return {name: paths.stamp(file) for name, file in sorted((f.name, f) for f in files)}
