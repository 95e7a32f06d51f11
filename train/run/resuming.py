"""Stores a run's command-line arguments in run.json, so that `--out RUN --resume` resumes it."""

import argparse
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import qwen_jax
from qwen_jax import PRESETS
from qwen_jax.checkpoint import directory
from qwen_jax.runtime import command, paths
from train.run import run_folder

PROGRAMS = {"text": "train/pretrain.py", "chat": "train/sft.py"}
_PLACES = ("ckpt", "model", "tokenizer", "data", "eval_data", "token_cache", "compilation_cache")
_EITHER = (("steps", "epochs"), ("ckpt", "model"), ("eval_data", "eval_share"))
# Arguments that are of one start alone and are not stored: where the run is, which process this is,
# and what is shown or profiled.
_PASSING = ("out", "resume", "dry_run", "debug", "profile_steps", "distributed", "coordinator")
_PASSING += ("processes", "process", "start_timeout", "heartbeat_timeout")


def complete(args: argparse.Namespace) -> None:
    """Fill in arguments that the command line leaves out from those stored in the run in --out.

    `args.kept` becomes a dict of the stored arguments that the command line does not exclude; it is
    empty without --resume. config.json and vocabulary are read from the run's own copies, wherever
    they came from. Raises UsageError if another command began the run.
    """
    args.kept = {}
    if not args.resume or not args.out:
        return
    out = paths.absolute(args.out)
    before = run_folder.read(out)
    kind = before.get("recipe", {}).get("data", args.kind)
    if kind != args.kind:
        raise command.UsageError(f"{out} is a run of {PROGRAMS[kind]}: go on with that command")
    replaced = {
        other
        for pair in _EITHER
        for other in pair
        if other not in args.given and set(pair) & set(args.given)
    }
    kept = before.get("arguments", {})
    args.kept = {x: value for x, value in kept.items() if hasattr(args, x) and x not in replaced}
    own = {"model": directory.CONFIG, "tokenizer": directory.TOKENIZER}
    for name, value in args.kept.items():
        if name in args.given:
            continue
        copy = out / run_folder.FILES / own.get(name, "")
        is_file = name in own and value not in PRESETS and copy.is_file()
        setattr(args, name, str(copy) if is_file else value)


def record(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Return the facts about this start that run.json stores.

    They are the command line, the arguments with absolute paths, and versions. args: the arguments,
    completed by `complete`. argv: the command line without the program's name.
    """
    given = {name: getattr(args, name) for name in args.given if name not in _PASSING}
    return {
        "command": shlex.join(["python", PROGRAMS[args.kind], *argv]),
        "arguments": args.kept | {name: _absolute(name, value) for name, value in given.items()},
        "versions": {
            "qwen_jax": qwen_jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "flax", "optax")},
        },
    }


def _absolute(name: str, value: object) -> object:
    """Return an argument's value, made an absolute path (or a list of them) if it names a place."""
    if name not in _PLACES or (name == "model" and value in PRESETS):
        return value
    if isinstance(value, list):
        return [_absolute(name, x) for x in value]
    return str(paths.absolute(value)) if isinstance(value, str | Path) else value
