"""Defines the command line of a training run: the recipe, changes to it, model, data and folder."""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.config.presets import PRESETS
from qwen_jax.runtime import caches, command, process_options
from train.run.recipes import RECIPES, Recipe, kind_of

_FIXED = ("name", "data")  # of a recipe
_OF_ADAPTERS = ("lora_alpha", "lora_dropout", "lora_targets", "base_dtype", "merge")
_OF_ADAPTERS += ("train_embeddings",)
_OF_KIND = {"field": "text", "system": "chat", "loss_on": "chat"}
_KINDS = {"text": "documents", "chat": "conversations"}
_REQUIRED = {"data": "FILE", "out": "DIR"}
_UNLESS = "nothing is required with --dry-run, or with --resume of a run that exists"
_METAVARS = {"system": "TEXT"}  # where it is not NAME


def parser(default: str, kind: str, *, about: str, examples: str) -> argparse.ArgumentParser:
    """Build the parser of a training command, with an option for each field of a recipe.

    default: the name of the command, and of its recipe if --recipe is not given.
    kind: the data of the recipes that the command accepts, "text" or "chat".
    about: what the command does, for --help.
    examples: the text below the options in --help.
    """
    result = command.Parser(prog=f"python train/{default}.py", description=about, epilog=examples)
    add = result.add_argument
    add(
        "--recipe",
        choices=[name for name, make in RECIPES.items() if make().data == kind],
        default=default,
        help="published recipe whose values to take (default: %(default)s)",
    )
    add(
        "--source",
        metavar="NAME",
        help="source to follow where Qwen's sources state different values: report (the technical "
        "report), memo or script (the technical memo and the fine-tuning script in Qwen's "
        "repository) (default: the source that the recipe is from)",
    )
    add("--dry-run", action="store_true", help="print the recipe with all changes and exit")
    _model_options(result.add_argument_group(f"model ({_UNLESS})"))
    _data_options(result.add_argument_group(f"data ({_UNLESS})"))
    _run_options(result.add_argument_group("run"))
    _checkpoint_options(result.add_argument_group("checkpoints"))
    group = result.add_argument_group(
        f"recipe (defaults: {default}'s for a 7B; --dry-run prints those of others)"
    )
    values = RECIPES[default]()
    for field in dataclasses.fields(Recipe):
        if field.name not in _FIXED:
            _add_field(group, field, getattr(values, field.name))
    process_options.add(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    result.set_defaults(kind=kind)
    return result


def _model_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the model to train and its tokenizer."""
    group.add_argument(
        "--ckpt",
        metavar="DIR",
        help="model directory whose weights to start from (required, or --model)",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="model to start from random weights: "
        f"{', '.join(PRESETS)}, or a config.json or the folder that holds it (required, or --ckpt)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="qwen.tiktoken that encodes the data (default: that of --ckpt; required with --model)",
    )


def _data_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the data for training and evaluation."""
    add = group.add_argument
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="files or folders to train on, also in gs:// (required): JSONL, JSON, Parquet, with "
        "records as in docs/training.md, or text, which is one document",
    )
    add(
        "--eval-data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files on which to measure the held-out loss (default: none)",
    )
    add(
        "--eval-share",
        type=float,
        default=0.0,
        metavar="X",
        help="share of --data to hold out and measure the loss on, from 0 to below 1 "
        "(default: %(default)s)",
    )
    add(
        "--token-cache",
        metavar="DIR",
        help="folder that keeps tokenized data, or gs:// (default: in the user's cache)",
    )
    add("--strict", action="store_true", help="stop at a bad record instead of leaving it out")


def _run_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the run's folder, evaluation and mesh."""
    add = group.add_argument
    add(
        "--out",
        metavar="DIR",
        help="folder of the run, new or empty without --resume (required)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue the run in --out, if any; options that are left out keep the run's values",
    )
    add(
        "--eval-every",
        type=int,
        default=500,
        metavar="N",
        help="measure the held-out loss every N steps; 0: only at the end (default: %(default)s)",
    )
    add(
        "--on-nan",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a NaN or infinite loss, or skip its batch (default: %(default)s)",
    )
    add(
        "--profile-steps",
        metavar="A-B",
        help="profile steps A to B, such as 10-12, for TensorBoard (default: none)",
    )
    add(
        "--merge",
        action="store_true",
        help="after training adapters, also write OUT/model, with the adapters merged into it",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp, context and tp, such as fsdp=4,tp=2 (default: the most devices "
        "over which model and batch divide)",
    )


def _checkpoint_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of checkpoints."""
    add = group.add_argument
    add(
        "--save-every",
        type=int,
        default=500,
        metavar="N",
        help="save a checkpoint every N steps; 0: only at the end (default: %(default)s)",
    )
    add(
        "--keep-last",
        type=command.positive,
        default=2,
        metavar="N",
        help="keep the last N checkpoints (default: %(default)s)",
    )
    add(
        "--keep-best",
        type=int,
        metavar="N",
        help="also keep the N checkpoints of lowest held-out loss (default: 1)",
    )


def _add_field(
    group: argparse._ArgumentGroup, field: "dataclasses.Field[Any]", value: object
) -> None:
    """Add the option of a recipe's field. value: the field's in the default recipe."""
    kind, _ = kind_of(field)
    told = " ".join(value) if isinstance(value, tuple) else value
    about = field.metadata["help"] + ("" if value is None else f" (default: {told})")
    options: dict[str, Any] = {"help": about, "default": None}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is tuple:
        options |= {"type": command.text, "nargs": "+", "metavar": "NAME"}
    else:
        name = {int: "N", float: "X", str: _METAVARS.get(field.name, "NAME")}[kind]
        options |= {"type": command.text if kind is str else kind, "metavar": name}
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def recipe(args: argparse.Namespace) -> Recipe:
    """Return the chosen recipe with the changes of the command line.

    Raises UsageError for a value that is not allowed, or an option that has no effect in the
    recipe.
    """
    options: dict[str, Any] = {"model": args.model or ""} | (
        {"source": args.source} if args.source else {}
    )
    changes: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(Recipe)
        if (value := getattr(args, field.name, None)) is not None and field.name not in _FIXED
    }
    make = RECIPES[args.recipe]
    if args.length and "length" in inspect.signature(make).parameters:
        options["length"] = args.length  # on which other values depend
    if {"epochs", "steps"} <= changes.keys():
        raise command.UsageError("--epochs and --steps both set the run's length: give one of them")
    try:
        made = make(**options)
        if "epochs" in changes:
            changes["steps"] = None
        made = dataclasses.replace(made, **changes)
    except ValueError as error:
        raise command.UsageError(str(error)) from None
    _refuse_idle(args, made)
    return made


def _refuse_idle(args: argparse.Namespace, made: Recipe) -> None:
    """Raise UsageError for an option that has no effect in a run of the recipe `made`."""
    if not made.lora_rank:
        how = "applies only to adapters, and this run trains all weights: leave it out, or train "
        how += "adapters with --recipe sft_lora of `python train/sft.py`"
        command.refuse(args, _OF_ADAPTERS, why=how)
    for name, kind in _OF_KIND.items():
        if kind != made.data:
            how = f"applies only to {_KINDS[kind]}, and recipe {args.recipe} learns from "
            command.refuse(args, (name,), why=f"{how}{_KINDS[made.data]}: leave it out")
    if made.schedule == "constant":
        how = "applies only to --schedule cosine, and the schedule of this run is constant: leave "
        command.refuse(args, ("final",), why=f"{how}it out, or add --schedule cosine")
    if made.data == "text" and made.pack == "joined":
        how = "applies only where examples stay whole, and --pack joined cuts them: leave it out, "
        command.refuse(args, ("too_long",), why=f"{how}or add --pack fitted or --pack alone")


def main(
    make_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None = None
) -> int:
    """Run a training command and return its exit code.

    make_parser: builds the command's parser. argv: the command line; None for that of the process.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return command.run(make_parser(), lambda args: work(args, given), argv=given)


def work(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Start the training run that the arguments describe, or print its recipe with --dry-run.

    argv: the command line, which the run stores. Raises UsageError for arguments that are missing
    or do not go together.
    """
    from train.run import resuming

    resuming.complete(args)
    wanted = recipe(args)
    if args.dry_run:
        for name, value in dataclasses.asdict(wanted).items():
            if name == "epochs" and wanted.steps:
                continue  # the steps hold
            print(f"{name:<18} {value}")
        return
    _check_required(args)
    _check_evaluation(args)
    process_options.join(args)
    caches.use_compilation_cache(args.compilation_cache)
    from qwen_jax.meshes import options
    from train.run import start

    sizes = None if args.mesh is None else options.mesh_sizes(args.mesh)
    if sizes is not None:
        options.virtual_cpu_devices(sizes)
    start.begin(args, wanted, sizes=sizes, start=resuming.record(args, argv))


def _check_required(args: argparse.Namespace) -> None:
    """Raise UsageError unless data, folder and what to start from are given."""
    if args.ckpt is not None and args.model is not None:
        raise command.UsageError(
            "--ckpt starts from a model's weights and --model from random ones: give one of them"
        )
    missing = [
        f"--{name} {what}" for name, what in _REQUIRED.items() if getattr(args, name) is None
    ]
    if args.ckpt is None and args.model is None:
        missing.append("--ckpt DIR or --model NAME")
    if missing:
        where = ""
        if args.resume and args.out:
            where = f" ({args.out} does not exist, or is no run that recorded its options)"
        raise command.UsageError(f"a run also needs {' and '.join(missing)}{where}")


def _check_evaluation(args: argparse.Namespace) -> None:
    """Check the options of evaluation and saving, and set the default of --keep-best.

    Raises UsageError for options that contradict each other.
    """
    if args.eval_data and args.eval_share:
        raise command.UsageError(
            "--eval-data and --eval-share both choose the held-out data: give one of them"
        )
    held_out = args.eval_data or args.eval_share
    needs = "needs held-out data: add --eval-data FILE or --eval-share X"
    if args.keep_best is None:
        args.keep_best = 1
    elif args.keep_best > 0 and not held_out:
        command.refuse(args, ("keep_best",), why=needs)
    if args.eval_every > 0 and not held_out:
        command.refuse(args, ("eval_every",), why=needs)
    for name in ("eval_every", "save_every", "keep_best"):
        if getattr(args, name) < 0:
            option = f"--{name.replace('_', '-')}"
            raise command.UsageError(f"{option} {getattr(args, name)}: must be 0 or more")
    if not 0 <= args.eval_share < 1:
        raise command.UsageError(
            f"--eval-share {args.eval_share:g}: must be at least 0 and less than 1"
        )
