"""The folder of a run: whose it is, and that one run at a time works in it. Knows no model."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax import command, directory, paths, processes

FILES, CHECKPOINTS = "files", "checkpoints"
RESULTS = MODEL, ADAPTER = "model", "adapter"
_RUN, _LOCK = "run.json", "run.lock"


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """With the folder made, and no other run in it, as far as process 0 of each can tell. A lock
    ends with its process, however that ends; where a file system has none, there is none.
    """
    paths.check_name(out)
    if processes.index():
        yield
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out an empty or new folder")
    paths.make_folder(out)
    with open(out / _LOCK, "a", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{out}: another run is at work there") from None
        yield


def claim(out: Path, identity: dict[str, Any], steps: int, resume: bool) -> None:
    """Take the folder for a run of so many steps, or find the run in it.

    What was never saved is no run: with `resume` another may take its place. Raises ValueError
    where the folder holds another run, or anything else.
    """
    file = out / _RUN
    if not out.exists():
        raise ValueError(f"{out} is not there: --out is a folder on a disk that all hosts share")
    if not file.exists():
        if any(path.name != _LOCK for path in out.iterdir()):
            raise ValueError(f"{out} holds something else: give --out an empty or new folder")
        directory.write_json(file, identity)
        return
    if not resume:
        raise ValueError(f"{out} holds a run already: --resume goes on with it")
    before = directory.read_json(file)
    changed = [
        {"data": "other examples", "ckpt": "another --ckpt"}.get(
            name, f"{name} was {old!r}, is {new!r}"
        )
        for name, old, new in _differences(before, identity)
        if name != "recipe.steps" and name != "recipe.epochs"
    ]
    taken = [int(x.name) for x in (out / CHECKPOINTS).glob("*") if x.name.isdecimal()]
    saved = taken or any((out / name).exists() for name in RESULTS)
    if changed and saved:
        raise ValueError(f"{out} holds another run: {'; '.join(changed[:5])}")
    if taken and max(taken) > steps:
        raise ValueError(f"{out} is at step {max(taken)}: of {steps} steps it has more")
    if before != identity and processes.index() == 0:
        if changed:
            command.say(f"{out} holds a run that was never saved: this one takes its place")
            shutil.rmtree(out / FILES, ignore_errors=True)
        directory.write_json(file, identity)  # with as many steps as it now has


def remove_results(out: Path) -> None:
    """What an end before this one has left, of a run that now goes on further."""
    for name in RESULTS:
        shutil.rmtree(out / name, ignore_errors=True)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            inner = f"{name}.{key}" if name else key
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield name, before, now
