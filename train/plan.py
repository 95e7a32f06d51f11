"""Plan a run on absent accelerators: the memory, work and time that its programs need.

    python train/plan.py --model qwen-72b --topology v5p:8x8x8 --mesh fsdp=64,tp=8 \\
        --length 4096 --batch 512

compiles the real training step (with --decode, prefill and the decode loop) on any machine, and
prints memory per device, FLOPs, collectives and a lower bound of time. Needs the `aot` extra.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.config.presets import PRESETS
from qwen_jax.runtime import command
from qwen_jax.runtime.command import UsageError
from train.planning import glossary


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python train/plan.py",
        description="Plan a run on accelerators that are not there: compile its programs here, and "
        "print the memory, work and time that they need.",
        epilog="Every word of a plan is explained by --glossary, and in docs/scaling.md.",
    )
    add = parser.add_argument
    add("--glossary", action="store_true", help="explain the words of a plan, and exit")
    add("--model", help=f"{', '.join(PRESETS)}, or a folder with a config.json (required)")
    add(
        "--topology",
        help="CHIP:SIDES*SLICES of v4, v5e, v5p, v6e or tpu7x, such as v5e:16x16 or v5e:16x16*2; "
        "CHIP:HOSTSxGPUS of a100, h100 or h200, such as h100:8x8 (required)",
    )
    add("--mesh", help="axes data, fsdp, context, tp, as fsdp=64,tp=8 (default: chosen)")
    add("--length", type=command.positive, default=2048, help="tokens per row (default: 2048)")
    add("--batch", type=command.positive, default=256, help="rows on all devices (default: 256)")
    add("--decode", action="store_true", help="plan prefill and decoding, not training")
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help=f"{command.ATTENTION}; default: auto (the chip's kernel, which a run tests first)",
    )
    add("--remat", default="full", help="recompute: full, projections or none (default: full)")
    add(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="split the residual stream by tokens over tp (default: where the tokens divide)",
    )
    add("--accumulate", type=command.positive, default=1, help="parts of a batch (default: 1)")
    add("--gradient-dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    adapters = parser.add_argument_group("training adapters, as `python train/sft.py` does")
    add_adapters = adapters.add_argument
    add_adapters("--lora-rank", type=command.positive, metavar="N", help="as 64 (default: none)")
    add_adapters("--base-dtype", default="same", help="same (bfloat16) or int8 (default: same)")
    add_adapters("--train-embeddings", action="store_true", help="embedding and head too")
    add("--cache-dtype", help="with --decode: int8 or int8_asymmetric (default: bfloat16)")
    add("--search", action="store_true", help="rank meshes, remat and halves of --batch")
    add("--tries", type=command.positive, default=6, help="most settings of --search (default: 6)")
    add("--json", action="store_true", help="print one JSON object")
    command.add_debug(parser)
    return command.run(parser, _work, argv=argv)


_OF_TRAINING = ("remat", "sequence_parallel", "accumulate", "gradient_dtype", "lora_rank")
_OF_TRAINING += ("base_dtype", "train_embeddings")


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that has no effect together with the other options given."""
    if args.decode:
        command.refuse(args, _OF_TRAINING, why="is of training: drop it, or --decode")
    else:
        command.refuse(args, ("cache_dtype",), why="is of decoding: add --decode")
    if args.search:
        command.refuse(
            args, ("mesh", "remat"), why="is what --search tries all of: drop one of them"
        )
    else:
        command.refuse(args, ("tries",), why="is of a search: add --search")
    if args.lora_rank is None:
        command.refuse(
            args, ("base_dtype", "train_embeddings"), why="is of adapters: give --lora-rank"
        )


def _work(args: argparse.Namespace) -> None:
    if args.glossary:
        print(glossary.text())
        return
    if missing := [f"--{name}" for name in ("model", "topology") if getattr(args, name) is None]:
        raise UsageError(f"give {' and '.join(missing)}")
    _refuse_idle(args)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing of this machine is used
    if not args.debug:  # C++ has traces of its own for what is handled, or said in a line, here
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from train.planning import topology as topologies

    try:
        topology = topologies.parse(args.topology)
    except ValueError as error:
        raise UsageError(str(error)) from None
    topologies.prepare(topology.chip.platform)
    from qwen_jax import meshes
    from qwen_jax.meshes import sharding
    from train.planning import attempts, report, search

    setting = _setting(args, topology)
    if args.search:
        tried = search.candidates(setting, topology, decode=args.decode)[: args.tries]
        if not tried:
            raise UsageError(
                f"--search: no mesh of {topology.devices} devices divides this model and "
                f"--batch {args.batch} or its halves"
            )
        found = _found(tried, topology, decode=args.decode)
        found.sort(key=rank)
    else:
        sizes = _mesh(args)
        if args.mesh is None:
            lengths = {**setting.config.sizes, "B": setting.batch}
            slices = topology.slices if topology.chip.platform == "tpu" else 1
            sizes = meshes.default(
                lengths, topology.devices, training=not args.decode, slices=slices
            )
            if math.prod(sizes.values()) < topology.devices:
                raise UsageError(
                    f"{args.model} and --batch {args.batch} do not divide over the "
                    f"{topology.devices} devices of {topology}, but over {meshes.describe(sizes)}"
                )
        if sizes[sharding.TENSOR] == 1 and args.sequence_parallel:
            how = f"splits over tp, and mesh {meshes.describe(sizes)} has none: name one in --mesh"
            command.refuse(args, ("sequence_parallel",), why=how)
        found = list(attempts.estimates(setting, topology, sizes=sizes, decode=args.decode))
    if args.json:
        print(json.dumps({"model": args.model, "plans": [x.to_json() for x in found]}))
    elif args.search:
        print(report.ranking(found))
    else:
        print("\n\n".join(report.text(x, args.model) for x in found))


def _found(tried: Sequence[Any], topology: Any, *, decode: bool) -> list[Any]:
    """Compile the settings that a search proposes, and return their estimates.

    tried: the candidates of `search.candidates`. A candidate that does not compile is reported and
    left out; if none compiles, the last error is raised.
    """
    from qwen_jax import meshes
    from train.planning import attempts

    found, failed = [], None
    for number, one in enumerate(tried, 1):
        label = f"{number} of {len(tried)}: "
        try:
            found += attempts.estimates(
                one.setting, topology, sizes=one.mesh, decode=decode, label=label
            )
        except attempts.NotCompiled as error:
            command.say(f"{one.setting.batch} rows, mesh {meshes.describe(one.mesh)}: {error}")
            failed = error
    if failed and not found:
        raise failed
    return found


def rank(x: Any) -> tuple[Any, ...]:
    """Return the key by which a search sorts its estimates, best first.

    Programs that fit come first, then those that lack the least memory. Equal ones are sorted by
    tokens/s and, if these are within 1 % of each other, by tokens/s if nothing overlaps.
    """
    serial = x.tokens / x.bound.serial if x.bound else 0.0
    percents = round(100 * math.log(x.tokens_per_second)) if x.bound else 0
    return x.task, not x.fits, x.over, -percents, -serial


def _mesh(args: argparse.Namespace) -> dict[str, int]:
    """Return the number of devices along each mesh axis that --mesh names; 1 along all other axes.

    Raises UsageError for an axis that decoding cannot use.
    """
    from qwen_jax.meshes import options, sharding

    sizes = options.mesh_sizes(args.mesh)
    if args.decode and sizes[sharding.CONTEXT] > 1:
        raise UsageError(
            f"--decode --mesh {args.mesh}: {sharding.CONTEXT} splits training only; decode with tp "
            "and fsdp"
        )
    return sizes


def _setting(args: argparse.Namespace, topology: Any) -> Any:
    from qwen_jax import attention
    from qwen_jax.attention import cache as kv
    from qwen_jax.checkpoint import directory
    from qwen_jax.config import Config, presets
    from train import step
    from train.planning.programs import Setting
    from train.run import recipes

    if args.model in presets.PRESETS:
        config = presets.PRESETS[args.model]
    elif (stored := directory.config_at(args.model)) is not None:
        config = Config.read(stored)
    else:
        raise UsageError(
            f"--model {args.model}: no config.json, nor a folder with one, and no preset. Presets: "
            f"{', '.join(presets.PRESETS)}"
        )
    _choice("--remat", args.remat, allowed=step.REMAT)
    _choice("--gradient-dtype", args.gradient_dtype, allowed=step.FLOATS)
    _choice("--cache-dtype", args.cache_dtype, allowed=(None, *kv.DTYPES))
    _choice("--attention", args.attention, allowed=("auto", *attention.IMPLEMENTATIONS))
    adapters = None
    if args.lora_rank is not None:
        _choice("--base-dtype", args.base_dtype, allowed=recipes.BASE_DTYPES)
        adapters = dataclasses.replace(
            recipes.sft_lora(),
            lora_rank=args.lora_rank,
            base_dtype=args.base_dtype,
            train_embeddings=args.train_embeddings,
        )
    if args.batch % args.accumulate:
        raise UsageError(f"--batch {args.batch} does not fall into {args.accumulate} parts")
    return Setting(
        config,
        batch=args.batch,
        length=args.length,
        attention=args.attention,
        remat=args.remat,
        sequence_parallel=args.sequence_parallel,
        cache_dtype=args.cache_dtype,
        accumulate=args.accumulate,
        adapters=adapters,
        gradient_dtype=args.gradient_dtype,
    )


def _choice(name: str, value: Any, *, allowed: Any) -> None:
    if value not in allowed:
        names = ", ".join(str(x) for x in allowed if x is not None)
        raise UsageError(f"{name} {value}: allowed are {names}")


if __name__ == "__main__":
    raise SystemExit(main())
