"""Starts a run: reads and checks what the command line names, and begins training."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from qwen_jax import PRESETS, checkpoint, meshes
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.checkpoint import directory, token_ids
from qwen_jax.config import Config
from qwen_jax.meshes import sharding
from qwen_jax.runtime import command, paths, records
from train.run import checkpoints
from train.run.loop import Settings
from train.run.recipes import Recipe
from train.run.task import Task, train


def begin(
    args: argparse.Namespace,
    wanted: Recipe,
    *,
    sizes: Mapping[str, int] | None,
    start: Mapping[str, object],
) -> None:
    """Train by a recipe as the command line says, and return at the end of the run.

    args: parsed by `arguments.parser`. sizes: of the mesh by axis, None for the default mesh.
    start: the facts of this start for run.json. Raises UsageError for arguments that do not go
    together, and ValueError as `task.train` does.
    """
    ckpt = None if args.ckpt is None else paths.absolute(args.ckpt)
    config = _config(args, ckpt)
    tokenizer, tokenizer_file = _tokenizer(args, ckpt, config=config)
    task = Task(
        recipe=wanted,
        config=config,
        ckpt=ckpt,
        tokenizer=tokenizer,
        tokenizer_file=tokenizer_file,
        files=tuple(records.files(args.data)),
        held_out=tuple(records.files(args.eval_data)),
        share=args.eval_share,
        strict=args.strict,
        start=start,
    )
    settings = Settings(
        out=paths.absolute(args.out),
        evaluate=args.eval_every,
        save=args.save_every,
        keep_last=args.keep_last,
        keep_best=args.keep_best,
        resume=args.resume,
        on_nan=args.on_nan,
        profile=_steps(args.profile_steps),
        merge=args.merge,
        token_cache=None if args.token_cache is None else paths.absolute(args.token_cache),
    )
    sizes = _mesh_sizes(args, wanted, config=config, sizes=sizes)
    checkpoints.ignore_late_callbacks()
    with meshes.entered(meshes.make(sizes)):
        train(task, settings)


def _config(args: argparse.Namespace, ckpt: Path | None) -> Config:
    """Return the config of the model in `ckpt`, or of --model, a preset or a config.json."""
    if ckpt is not None:
        checkpoint.verify_whole(ckpt)
        return checkpoint.load_config(ckpt)
    if args.model in PRESETS:
        return PRESETS[args.model]
    if (file := directory.config_at(args.model)) is not None:
        return Config.read(file)
    names = ", ".join(PRESETS)
    raise command.UsageError(f"--model {args.model}: a config.json, or one of {names}")


def _tokenizer(
    args: argparse.Namespace, ckpt: Path | None, *, config: Config
) -> tuple[Tokenizer, Path]:
    """Return the tokenizer in `ckpt` or of --tokenizer, and its file.

    Raises ValueError if there is none, or if it does not fit the model.
    """
    own = checkpoint.load_tokenizer(ckpt) if ckpt else None
    given = None if args.tokenizer is None else paths.parse(args.tokenizer)
    if own is not None and given is not None:
        raise command.UsageError(f"{args.ckpt} has its own tokenizer: drop --tokenizer")
    file = ckpt / directory.TOKENIZER if ckpt and own else given
    if file is None or not file.exists():
        raise ValueError(f"{args.ckpt or args.model} has no tokenizer: give --tokenizer FILE")
    tokenizer = own or Tokenizer.from_file(file)
    token_ids.check_whole(file, tokenizer, vocab_size=config.vocab_size)
    if ckpt is not None and own is None:
        token_ids.check(ckpt, tokenizer, vocabulary=file)
    if len(tokenizer) > config.vocab_size:
        lacking = f'the model has "vocab_size": {config.vocab_size}: make it so many or more'
        raise ValueError(f"{file} has {len(tokenizer)} tokens, but {lacking}")
    return tokenizer, file


def _mesh_sizes(
    args: argparse.Namespace, wanted: Recipe, *, config: Config, sizes: Mapping[str, int] | None
) -> Mapping[str, int]:
    """Return the size of each mesh axis of the run, over which the recipe's batches divide.

    sizes: those of --mesh, or of the mesh stored in the run; None takes a mesh that suits the model
        and the devices here.
    """
    lengths = {**config.sizes, "B": wanted.rows // wanted.accumulate, "T": wanted.length}
    devices = jax.devices()
    if sizes is not None and "mesh" not in args.given and math.prod(sizes.values()) > len(devices):
        command.say(
            f"the run's mesh {args.mesh} is for more than {len(devices)} devices: not taken"
        )
        sizes = None
    if sizes is None:
        slices = meshes.count_slices(devices)
        sizes = meshes.default(lengths, len(devices), training=True, slices=slices)
    if sizes[sharding.TENSOR] == 1 and wanted.sequence_parallel:
        how = f"splits over tp, and mesh {meshes.describe(sizes)} has none: name one in --mesh"
        command.refuse(args, ("sequence_parallel",), why=how)
    parallel, _ = meshes.splits_tokens(wanted.sequence_parallel, wanted.length, mesh=sizes)
    meshes.check(lengths, sizes, sequence_parallel=parallel)
    return sizes


def _steps(text: str | None) -> tuple[int, int] | None:
    """Parse --profile-steps, "FIRST-LAST"; None where it is not given."""
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise command.UsageError(f"--profile-steps {text}: write it as 10-12")
    return int(first), int(last)
