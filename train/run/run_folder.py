"""Manages the folder of a run: records which run it holds, and lets one run at a time use it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint import directory
from qwen_jax.config import Config
from qwen_jax.runtime import command, lock, paths, processes, texts

FILES, CHECKPOINTS, TOKENS = "files", "checkpoints", "tokens"
RESULTS = MODEL, ADAPTER = "model", "adapter"
_RUN, _LOCK = directory.RUN, "run.lock"
# Fields of a recipe that change roundings alone: a resumed run may have other values.
ROUNDINGS = ("remat", "sequence_parallel", "attention", "gradient_dtype")
# Fields of a recipe on which other fields or the examples depend, which a message names first; and
# fields that a resumed run may change.
_FIRST = ("name", "length", "pack", "too_long", "field", "system", "loss_on", "seed")
_FREE = ("steps", "epochs", *ROUNDINGS)
_OF_START = ("command", "versions")
_SHOWN = 3  # differences between two runs that a message names


@contextlib.contextmanager
def locked(out: Path) -> Iterator[Callable[[], None]]:
    """Create the folder of a run and lock it against other runs while the context is open.

    Process 0 takes the lock. Yields a function that raises if another run has taken the folder,
    and raises `lock.Busy`, both as `lock.alone` does.
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
    """Raise ValueError if the folder holds a run and `resume` is false, or holds other files.

    Process 0 also calls this before data is encoded, so that no work is lost.
    """
    if (out / _RUN).exists():
        if not resume:
            raise ValueError(f"{out} holds a run already: --resume goes on with it")
    elif directory.names(out) - {_LOCK, TOKENS}:
        raise ValueError(f"{out} holds something else: give --out an empty or new folder")


def read(out: Path) -> dict[str, Any]:
    """Return the contents of run.json in the run's folder; {} if the file is missing."""
    return directory.read_json(out / _RUN) if (out / _RUN).exists() else {}


def claim(
    out: Path, identity: dict[str, Any], *, steps: int, resume: bool, start: Mapping[str, Any]
) -> None:
    """Register a run in its folder's run.json, or check that this file describes the same run.

    identity: facts that must be equal for a run to resume.
    steps: the number of steps of the run.
    resume: whether the run may continue the one in the folder, or replace one that saved nothing.
    start: other facts about this start (`resuming.record`, and "rows", the number of training
        rows).

    run.json keeps the command and versions of the first start, and has those of the last as
    "resumed"; arguments and rows are the last start's. Raises ValueError if the folder holds
    another run or other files.
    """
    file, now = out / _RUN, {**identity, **start}
    if processes.index() and not file.exists():
        raise ValueError(
            f"{out} has no {_RUN}, which process 0 has written: --out is a folder on a disk that "
            "all hosts share, or in gs://"
        )
    check(out, resume)
    if not file.exists():
        directory.write_json(file, now)
        return
    before = read(out)
    changed = _differences(before, now)
    saved = _steps_saved(out / CHECKPOINTS)
    if changed and (saved or any((out / name).exists() for name in RESULTS)):
        raise ValueError(_another_run(out, before, changed=changed))
    if saved and max(saved) > steps:
        raise ValueError(f"{out} is at step {max(saved)}: of {steps} steps it has more")
    if processes.index():
        return
    if changed:
        command.say(f"{out} holds a run that was never saved: this one takes its place")
        paths.remove_tree(out / FILES)
    else:  # the same run, perhaps with another number of steps
        resumed = {name: now.pop(name) for name in _OF_START if name in now}
        now |= {name: before[name] for name in _OF_START if name in before}
        now |= {"resumed": resumed} if resumed else {}
    directory.write_json(file, now)


def _another_run(out: Path, before: Mapping[str, Any], *, changed: Sequence[str]) -> str:
    """Compose the message for a folder whose run differs from this one as `changed` says."""
    goes_on = f"--out {out} --resume alone takes what it began with"
    if "arguments" not in before:  # older runs stored none
        goes_on = "to go on with it, give what it was begun with"
    more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return (
        f"{out} holds another run: {'; '.join(changed[:_SHOWN])}{more}: {goes_on}; for another "
        "run give another --out"
    )


def has_results(out: Path) -> bool:
    """Return whether this run has come to an end before, and written a model or an adapter."""
    return any((out / name).exists() for name in RESULTS)


def remove_results(out: Path) -> None:
    """Remove the model and adapter of an earlier end of this run, which now trains further."""
    for name in RESULTS:
        paths.remove_tree(out / name)


def _steps_saved(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder.

    On a disk, a checkpoint gets its name when it is complete; in gs:// Orbax writes a marker file
    last.
    """
    found = [x for x in folder.iterdir() if x.name.isdecimal()] if folder.exists() else []
    last = "commit_success.txt"
    return [int(x.name) for x in found if not paths.is_remote(x) or (x / last).exists()]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what makes this another run than before, likeliest cause first; [] if nothing does.

    before, now: the contents of run.json, stored and new; old runs lack "arguments". The number of
    steps may differ.
    """
    return [*_of_model(before, now), *_of_recipe(before, now), *_of_data(before, now)]


def _of_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe a change of the model that training starts from, and of its configuration."""
    if before.get("ckpt") != now["ckpt"]:
        argument = _argument_change("ckpt", before, now=now)
        yield argument or "--ckpt has another model than before: its manifest.json has changed"
    for name, old, new in _changed(before.get("config", {}), now["config"]):
        yield f"config.{name} was {texts.shown(old)}, is {texts.shown(new)}"


def _of_recipe(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe each change of the recipe, except those that a resumed run may make."""
    found = {
        name: f"was {texts.shown(old)}, is {texts.shown(new)}"
        for name, old, new in _changed(before.get("recipe", {}), now["recipe"])
        if name not in _FREE
    }
    for name in sorted(found, key=lambda x: (x not in _FIRST, x in _FIRST and _FIRST.index(x))):
        yield f"--{'recipe' if name == 'name' else name.replace('_', '-')} {found[name]}"


def _of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe a change of the training examples, unless a change of the recipe explains it.

    before, now: the contents of run.json, stored and new.
    """
    if before.get("data") == now["data"]:
        return
    names = ("data", "tokenizer", "eval_share")
    arguments = [_argument_change(name, before, now=now) for name in names]
    recipes = before.get("recipe", {}), now["recipe"]
    if any(arguments):
        yield from filter(None, arguments)
    elif any(name in _FIRST for name, *_ in _changed(*recipes)):
        return
    elif "arguments" not in before:
        yield "other examples: another --data, --tokenizer or --eval-share"
    else:
        yield f"--data has changed: it made {before['rows']:,} rows, and makes {now['rows']:,}"


def _argument_change(name: str, before: Mapping[str, Any], *, now: Mapping[str, Any]) -> str | None:
    """Describe how an argument of the command line changed; None if it did not or is unknown."""
    if "arguments" not in before:
        return None
    old, new = (x["arguments"].get(name) for x in (before, now))
    if old == new:
        return None
    shown = [" ".join(x) if isinstance(x, list) else "none" if x is None else x for x in (old, new)]
    return f"--{name.replace('_', '-')} was {shown[0]}, is {shown[1]}"


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], *, name: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, old value, new value) for each difference of two objects, in the order of `now`.

    name: the prefix of the names, for objects within objects.
    """
    for key in dict.fromkeys([*now, *before]):
        inner, old, new = f"{name}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changed(old, new, name=f"{inner}.")
        elif old != new:
            yield inner, old, new


def write_files(
    out: Path,
    *,
    ckpt: Path | None,
    config: Config,
    tokenizer_file: Path,
    end: int,
    chat_format: str,
) -> Path:
    """Write configuration, tokenizer and generation settings of the trained model into OUT/files.

    ckpt: the model directory that training starts from, whose other files are copied; None for
        fresh weights.
    config: the architecture of a model of fresh weights.
    end: the id of the token that ends a text.
    chat_format: the format that the model is trained on, "chatml" or "raw". If the generation
        settings in `ckpt` have another, they are replaced by the original's defaults.

    A resumed run writes only what is missing. Returns the folder.
    """
    folder = out / FILES
    paths.make_folder(folder)
    given, kept = folder / directory.GENERATION_CONFIG, folder / directory.CONFIG
    begun = given.exists() and kept.exists()  # config.json is written last
    sources = {directory.TOKENIZER: tokenizer_file}
    if ckpt is not None:
        sources = {x.name: x for x in directory.carried(directory.existing(ckpt))} | sources
    for name, file in sources.items():
        if not (folder / name).exists():
            paths.copy(file, folder / name)
    settings = directory.read_json(given) if given.exists() else {}
    if not begun and settings.get("chat_format") != chat_format:
        settings = {
            "chat_format": chat_format,
            "eos_token_id": end,
            "pad_token_id": end,
            "max_window_size": min(6144, config.max_position_embeddings),
            "max_new_tokens": 512,
            "do_sample": True,
            "top_k": 0,
            "top_p": 0.8,
        }
        directory.write_json(given, settings)
    if not kept.exists():
        like = ckpt and directory.read_json(ckpt / directory.CONFIG)
        directory.write_json(kept, like or config.to_hf())
    return folder
