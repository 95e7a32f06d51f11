"""The options of `python train/plan.py`, and the check that none is without effect."""

import argparse

from qwen_jax.config.presets import PRESETS
from qwen_jax.runtime import command

_EXAMPLES = r"""examples:
  python train/plan.py --model qwen-7b --topology v5e:4x4 --batch 64
  python train/plan.py --model qwen-72b --topology v5p:8x8x8 --mesh fsdp=64,tp=8 \
      --length 4096 --batch 512
  python train/plan.py --model qwen-7b --topology h100:1x8 --lora-rank 64 --batch 16
  python train/plan.py --model qwen-72b --topology v5p:4x4x4 --decode --batch 64
  python train/plan.py --model DIR --topology v5e:16x16 --search
  python train/plan.py --model qwen-7b --topology v5e:2x4 --serve --cache-dtype int8

Every word of a plan is explained by --glossary, and in docs/scaling.md.
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of `python train/plan.py`."""
    result = command.Parser(
        prog="python train/plan.py",
        description="Plan a run on accelerators that this machine lacks: compile a training step "
        "or, with --decode,\nprefill and decoding or, with --serve, all programs of a serving "
        "engine, and print\nthe memory, FLOPs, collectives and lower bound of time.",
        epilog=_EXAMPLES,
    )
    add = result.add_argument
    add("--glossary", action="store_true", help="explain the words of a plan and exit")
    _run_options(result.add_argument_group("model and machine"))
    _training_options(result.add_argument_group("training"))
    _adapter_options(result.add_argument_group("training of adapters, as by `python train/sft.py`"))
    group = result.add_argument_group("decoding").add_argument
    group("--decode", action="store_true", help="plan prefill and decoding instead of training")
    group(
        "--cache-dtype",
        metavar="NAME",
        help="dtype of the KV cache: int8 or int8_asymmetric; with --serve, int8 (default: that of "
        "the weights)",
    )
    _serving_options(result.add_argument_group("serving"))
    group = result.add_argument_group("search").add_argument
    group(
        "--search",
        action="store_true",
        help="compare meshes, remat policies and batch sizes (--batch, its half and so on); print "
        "a ranking",
    )
    group(
        "--tries",
        type=command.positive,
        default=6,
        metavar="N",
        help="compile at most N settings of --search, or meshes of --serve (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object")
    command.add_debug(result)
    return result


def _run_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the model, the devices and the batch."""
    add = group.add_argument
    add(
        "--model",
        metavar="NAME",
        help=f"model (required): {', '.join(PRESETS)}, or a config.json or the folder with one",
    )
    add(
        "--topology",
        metavar="SPEC",
        help="TPUs as CHIP:SIDES, or CHIP:SIDES*SLICES for several slices, with CHIP v4, v5e, v5p, "
        "v6e or tpu7x, such as v5e:16x16 or v5e:16x16*2; GPUs as CHIP:GPUS or CHIP:HOSTSxGPUS "
        "with CHIP a100, h100 or h200, such as h100:1 or h100:8x8 (required)",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp, context and tp, such as fsdp=64,tp=8 (default: all devices, on axes "
        "over which the model and --batch divide)",
    )
    add(
        "--length",
        type=command.positive,
        default=2048,
        metavar="N",
        help="tokens per row; with --decode, slots of the KV cache (default: %(default)s)",
    )
    add(
        "--batch",
        type=command.positive,
        default=256,
        metavar="N",
        help="rows per batch, over all devices together (default: %(default)s)",
    )
    add(
        "--weights",
        default="float",
        choices=("float", "int4", "int8"),
        help="weights of the layers: float, or int4 or int8 as in GPTQ checkpoints with groups of "
        "128, which training takes below adapters (default: %(default)s)",
    )
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help=f"implementation of attention: {command.ATTENTION} (default: auto; the plan takes "
        "the chip's kernel, which a run would test first)",
    )


def _training_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of a training step."""
    add = group.add_argument
    add(
        "--remat",
        default="full",
        metavar="NAME",
        help="recompute in the backward pass: full (all of a block), projections (all but the "
        "outputs of its projections) or none (default: %(default)s)",
    )
    add(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="split the residual stream by tokens over tp (default: where tp divides --length)",
    )
    add(
        "--accumulate",
        type=command.positive,
        default=1,
        metavar="N",
        help="accumulate the gradient over N parts of a batch (default: %(default)s)",
    )
    add(
        "--gradient-dtype",
        default="float32",
        metavar="NAME",
        help="sum gradients over devices in float32 or bfloat16 (default: %(default)s)",
    )


def _adapter_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the training of adapters."""
    add = group.add_argument
    add(
        "--lora-rank",
        type=command.positive,
        metavar="N",
        help="train adapters of rank N, such as 64 (default: none, train all weights)",
    )
    add(
        "--base-dtype",
        default="same",
        metavar="NAME",
        help="store the frozen weights in int8, or in bfloat16 (same) (default: %(default)s)",
    )
    add("--train-embeddings", action="store_true", help="also train the whole embedding and head")


def _serving_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of a serving engine."""
    add = group.add_argument
    add(
        "--serve",
        action="store_true",
        help="plan a serving engine: the rows and tokens of context that fit, on --mesh or on the "
        "best of the meshes of tp and data",
    )
    add(
        "--rows",
        type=command.positive,
        metavar="R",
        help="rows that decode at a time (default: 64 for each part of the batch)",
    )
    add(
        "--max-length",
        type=command.positive,
        metavar="T",
        help="longest request, prompt and new tokens together (default: the larger of "
        "max_position_embeddings and seq_length of the model)",
    )
    add("--page", type=command.positive, metavar="N", help="tokens in a page (default: 128)")
    add(
        "--chunk",
        type=command.positive,
        metavar="N",
        help="prompt tokens that are computed between two decode steps (default: 512)",
    )
    add(
        "--dtype",
        default="bfloat16",
        metavar="NAME",
        help="dtype of the weights: float32, bfloat16 or float16 (default: %(default)s)",
    )


_OF_SERVING = ("rows", "max_length", "page", "chunk", "dtype")
_OF_TRAINING = ("remat", "sequence_parallel", "accumulate", "gradient_dtype", "lora_rank")
_OF_TRAINING += ("base_dtype", "train_embeddings")


def refuse_idle(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that has no effect beside the others."""
    out = "leave it out, or"
    if args.serve:
        how = f"does not apply to serving: {out} leave out --serve"
        command.refuse(args, (*_OF_TRAINING, "decode", "search", "batch", "length"), why=how)
    else:
        how = f"applies only to serving: {out} add --serve"
        command.refuse(args, _OF_SERVING, why=how)
    if args.decode:
        how = f"applies only to training: {out} leave out --decode"
        command.refuse(args, _OF_TRAINING, why=how)
    elif not args.serve:
        how = f"applies only to decoding: {out} add --decode"
        command.refuse(args, ("cache_dtype",), why=how)
    if args.search:
        how = "cannot be combined with --search, which tries them all: leave out one of them"
        command.refuse(args, ("mesh", "remat"), why=how)
    elif not args.serve or args.mesh is not None:
        how = f"applies only to a search: {out} add --search"
        how = f"applies only without --mesh: {out} leave out --mesh" if args.serve else how
        command.refuse(args, ("tries",), why=how)
    if args.weights in ("int4", "int8"):
        how = f"cannot be combined with --weights {args.weights}: {out} leave out --weights"
        command.refuse(args, ("base_dtype",), why=how)
        if not (args.decode or args.serve or args.lora_rank):
            raise command.UsageError(
                f"--weights {args.weights}: integers are not trained: add --lora-rank N to train "
                "adapters on them, or --decode, or --serve"
            )
    if args.lora_rank is None:
        how = f"applies only to adapters: {out} add --lora-rank N"
        command.refuse(args, ("base_dtype", "train_embeddings"), why=how)
