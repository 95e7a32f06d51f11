"""A run started: what the command line names is read and checked, and training begins."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from qwen_jax.runtime import command
from train.run.recipes import Recipe


def begin(
    args: argparse.Namespace, wanted: Recipe, *, sizes: Any, start: Mapping[str, Any]
) -> None:
    import jax

    from qwen_jax import PRESETS, checkpoint, meshes
    from qwen_jax.chat.tokenizer import Tokenizer
    from qwen_jax.checkpoint import directory, token_ids
    from qwen_jax.config import Config
    from qwen_jax.meshes import sharding
    from qwen_jax.runtime import paths
    from train.data import records
    from train.run import checkpoints, loop, task

    ckpt = None if args.ckpt is None else paths.absolute(args.ckpt)
    if ckpt is not None:
        checkpoint.verify_whole(ckpt)
        config = checkpoint.load_config(ckpt)
    elif args.model in PRESETS:
        config = PRESETS[args.model]
    elif (stored := directory.config_at(args.model)) is not None:
        config = Config.read(stored)
    else:
        names = ", ".join(PRESETS)
        raise command.UsageError(f"--model {args.model}: a config.json, or one of {names}")
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
    given = task.Task(
        wanted,
        config,
        ckpt=ckpt,
        tokenizer=tokenizer,
        tokenizer_file=file,
        files=tuple(records.files(args.data)),
        held_out=tuple(records.files(args.eval_data)),
        share=args.eval_share,
        strict=args.strict,
        start=start,
    )
    settings = loop.Settings(
        paths.absolute(args.out),
        args.eval_every,
        save=args.save_every,
        keep_last=args.keep_last,
        keep_best=args.keep_best,
        resume=args.resume,
        on_nan=args.on_nan,
        profile=_steps(args.profile_steps),
        merge=args.merge,
        token_cache=None if args.token_cache is None else paths.absolute(args.token_cache),
    )
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
    checkpoints.ignore_late_callbacks()
    with meshes.entered(meshes.make(sizes)):
        task.train(given, settings)


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise command.UsageError(f"--profile-steps {text}: write it as 10-12")
    return int(first), int(last)
