"""The folder of a run: whose it is, and that one run at a time works in it. Knows no model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint import directory
from qwen_jax.runtime import command, lock, paths, processes

FILES, CHECKPOINTS, TOKENS = "files", "checkpoints", "tokens"
RESULTS = MODEL, ADAPTER = "model", "adapter"
_RUN, _LOCK = "run.json", "run.lock"
# Fields of a recipe that change roundings alone: a run may go on with others.
ROUNDINGS = ("remat", "sequence_parallel", "attention", "gradient_dtype")
_MAY_DIFFER = {f"recipe.{name}" for name in ("steps", "epochs", *ROUNDINGS)}


@contextlib.contextmanager
def alone(out: Path) -> Iterator[Callable[[], None]]:
    """Make the folder of a run, and keep every other run out of it meanwhile.

    Process 0 takes the lock. Yields what `lock.alone` does; raises `lock.Busy`.
    """
    paths.check_name(out)
    if processes.index():
        yield lambda: None
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out an empty or new folder")
    with lock.alone(out, out / _LOCK) as check:
        yield check


def check(out: Path, resume: bool) -> None:
    """Raise ValueError where the folder holds a run that is not to go on, or anything else. Process
    0 asks before there is any work that would be lost.
    """
    if (out / _RUN).exists():
        if not resume:
            raise ValueError(f"{out} holds a run already: --resume goes on with it")
    elif directory.names(out) - {_LOCK, TOKENS}:
        raise ValueError(f"{out} holds something else: give --out an empty or new folder")


def claim(out: Path, identity: dict[str, Any], steps: int, resume: bool) -> None:
    """Take the folder for a run of so many steps, or find the run in it.

    What was never saved is no run: with `resume` another may take its place. Raises ValueError
    where the folder holds another run, or anything else.
    """
    file = out / _RUN
    if processes.index() and not file.exists():
        raise ValueError(
            f"{out} has no {_RUN}, which process 0 has written: --out is a folder on a disk that "
            "all hosts share, or in gs://"
        )
    check(out, resume)
    if not file.exists():
        directory.write_json(file, identity)
        return
    before = directory.read_json(file)
    changed = [
        {"data": "other examples", "ckpt": "another --ckpt"}.get(
            name, f"{name} was {old!r}, is {new!r}"
        )
        for name, old, new in _differences(before, identity)
        if name not in _MAY_DIFFER
    ]
    taken = _steps_saved(out / CHECKPOINTS)
    saved = taken or any((out / name).exists() for name in RESULTS)
    if changed and saved:
        raise ValueError(f"{out} holds another run: {'; '.join(changed[:5])}")
    if taken and max(taken) > steps:
        raise ValueError(f"{out} is at step {max(taken)}: of {steps} steps it has more")
    if before != identity and processes.index() == 0:
        if changed:
            command.say(f"{out} holds a run that was never saved: this one takes its place")
            paths.remove_tree(out / FILES)
        directory.write_json(file, identity)  # with as many steps as it now has


def remove_results(out: Path) -> None:
    """What an end before this one has left, of a run that now goes on further."""
    for name in RESULTS:
        paths.remove_tree(out / name)


def _steps_saved(folder: Path) -> list[int]:
    """The steps of whole checkpoints. On a disk they have their name when they are whole; in gs://
    Orbax writes a file last.
    """
    found = [x for x in folder.iterdir() if x.name.isdecimal()] if folder.exists() else []
    last = "commit_success.txt"
    return [int(x.name) for x in found if not paths.is_remote(x) or (x / last).exists()]


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            inner = f"{name}.{key}" if name else key
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield name, before, now
