"""Checks, locks and completes the folder that a converter writes.

An incomplete folder holds `unfinished.json`, which identifies source and settings. The same command
finds this file and continues; a different command is refused. The file is removed when the folder
is complete. While one command works in the folder, every other command is refused, even the same.
"""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qwen_jax.checkpoint.directory import MANIFEST, UNFINISHED, names
from qwen_jax.runtime import command, lock, paths, processes
from qwen_jax.runtime.texts import read_json


def check_apart(source: Path, target: Path) -> None:
    """Raise UsageError if the target folder is the source folder or inside it.

    Raises ValueError if TensorStore could not open the target folder because of its name.
    """
    paths.check_name(target)
    source, target = (p if paths.is_remote(p) else p.resolve() for p in (source, target))
    if source == target or source in target.parents:
        raise command.UsageError(f"DST {target} is within SRC {source}: choose another place")


def is_unfinished(target: Path) -> bool:
    """Return whether a folder is the target of a conversion that has not ended."""
    return (target / UNFINISHED).exists()


@contextmanager
def locked(target: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of `target`, so that no other program writes there. Process 0 locks for all.

    Yields a function that raises if another program has taken the lock (`lock.alone`). Raises
    ValueError if `target` is not a folder or is a finished model directory, and `lock.Busy` if
    another program holds the lock.
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
    """Raise ValueError if `target` is a file or a finished model directory."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is not a folder: choose another place")
    if (target / MANIFEST).exists():
        raise ValueError(
            f"{target} is a finished model directory: choose another place, or add --verify to "
            "compare it with its source"
        )


def check_usable(target: Path, facts: Mapping[str, object]) -> bool:
    """Check that a conversion may write to the folder `target`. Writes nothing.

    Returns True if the folder holds an unfinished conversion by the same command, which can be
    resumed, and False if it is empty or missing. facts: the values that identify the command.
    Raises ValueError if the folder holds other files, or another command's unfinished work.
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
    keys = {**facts, **begun}  # an option that one of the two commands lacks is a difference, too
    if different := [key for key in keys if begun.get(key) != facts.get(key)]:
        changes = [f"{key} was {begun.get(key)!r}" for key in different if key != "source"]
        changes += ["the source was another or has changed"] if "source" in different else []
        raise ValueError(
            f"{target} is the unfinished work of another command ({', '.join(changes)}): give that "
            "one again, or remove the folder"
        )
    return True


def check_shared(target: Path, facts: Mapping[str, object]) -> None:
    """Raise ValueError unless this process sees the folder that process 0 has begun to write.

    facts: the values that identify the conversion.
    """
    if not is_unfinished(target):
        raise ValueError(
            f"{target} is not the folder that process 0 writes to: all hosts need one disk, or gs://"
        )
    check_usable(target, facts)


def check_space(target: Path, needed: int) -> None:
    """Raise ValueError if the disk of `target` has less than `needed` bytes free."""
    if paths.is_remote(target):
        return
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{target} needs {command.size(needed)} more on a disk that has {command.size(free)} "
            "free: free some space or choose another place"
        )


def complete(target: Path) -> None:
    """Mark a target as complete."""
    (target / UNFINISHED).unlink()


@contextmanager
def explained(target: Path, needed: int) -> Iterator[None]:
    """Turn the OSError of a full disk or an exceeded quota into a ValueError that says what to do.

    needed: the number of bytes to be written within the context, for the message.
    """
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
    """Return each file's size and time of change by name, by which a changed source is noticed."""
    return {name: paths.stamp(file) for name, file in sorted((f.name, f) for f in files)}
