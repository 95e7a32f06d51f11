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
from train.planning.plan_options import parser, refuse_idle


def main(argv: list[str] | None = None) -> int:
    return command.run(parser(), _work, argv=argv)


def _work(args: argparse.Namespace) -> None:
    if args.glossary:
        print(glossary.text())
        return
    if missing := [f"--{name}" for name in ("model", "topology") if getattr(args, name) is None]:
        raise UsageError(f"a plan also needs {' and '.join(missing)}")
    refuse_idle(args)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing of this machine is used
    if not args.debug:  # C++ has traces of its own for what is handled, or said in a line, here
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from train.planning import topology as topologies

    try:
        topology = topologies.parse(args.topology)
    except ValueError as error:
        raise UsageError(str(error)) from None
    topologies.prepare(topology.chip.platform)
    from train.planning import attempts, report, search

    setting = _setting(args, topology)
    if args.search:
        tried = search.candidates(setting, topology, decode=args.decode)[: args.tries]
        if not tried:
            raise UsageError(
                f"--search: no mesh of {topology.devices} devices divides this model and "
                f"--batch {args.batch} or its halves; give another --batch or --topology"
            )
        found = _found(tried, topology, decode=args.decode)
        found.sort(key=rank)
    else:
        sizes = _mesh(args, setting, topology)
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


def _mesh(args: argparse.Namespace, setting: Any, topology: Any) -> dict[str, int]:
    """Return the number of devices along each mesh axis that --mesh names; 1 along all other axes.

    Raises UsageError for an axis that decoding cannot use.
    """
    from qwen_jax import meshes
    from qwen_jax.meshes import options, sharding

    sizes = options.mesh_sizes(args.mesh)
    if args.decode and sizes[sharding.CONTEXT] > 1:
        raise UsageError(
            f"--mesh {args.mesh}: axis {sharding.CONTEXT} splits training only; with --decode use "
            "tp and fsdp"
        )
    if args.mesh is None:
        lengths = {**setting.config.sizes, "B": setting.batch}
        slices = topology.slices if topology.chip.platform == "tpu" else 1
        sizes = meshes.default(lengths, topology.devices, training=not args.decode, slices=slices)
        if math.prod(sizes.values()) < topology.devices:
            raise UsageError(
                f"{args.model} and --batch {args.batch} do not divide over the "
                f"{topology.devices} devices of {topology}, but over {meshes.describe(sizes)}: "
                "give another --batch or --topology, or a --mesh"
            )
    if sizes[sharding.TENSOR] == 1 and args.sequence_parallel:
        how = f"needs axis tp, and mesh {meshes.describe(sizes)} has none: leave it out, or add tp "
        command.refuse(args, ("sequence_parallel",), why=f"{how}to --mesh")
    return sizes


def _setting(args: argparse.Namespace, topology: Any) -> Any:
    """The setting to plan. Raises UsageError for a value that is not allowed."""
    from qwen_jax import attention
    from qwen_jax.attention import cache as kv
    from train import step
    from train.planning.programs import Setting

    config = _config(args.model)
    _choice("--remat", args.remat, allowed=step.REMAT)
    _choice("--gradient-dtype", args.gradient_dtype, allowed=step.FLOATS)
    _choice("--cache-dtype", args.cache_dtype, allowed=(None, *kv.DTYPES))
    _choice("--attention", args.attention, allowed=("auto", *attention.IMPLEMENTATIONS))
    if args.batch % args.accumulate:
        raise UsageError(
            f"--accumulate {args.accumulate}: must divide --batch {args.batch} without a rest"
        )
    return Setting(
        config,
        batch=args.batch,
        length=args.length,
        attention=args.attention,
        remat=args.remat,
        sequence_parallel=args.sequence_parallel,
        cache_dtype=args.cache_dtype,
        accumulate=args.accumulate,
        adapters=_adapters(args),
        gradient_dtype=args.gradient_dtype,
    )


def _config(model: str) -> Any:
    """The config of a preset, or of a config.json or a folder with one."""
    from qwen_jax.checkpoint import directory
    from qwen_jax.config import Config

    if model in PRESETS:
        return PRESETS[model]
    if (stored := directory.config_at(model)) is not None:
        return Config.read(stored)
    raise UsageError(
        f"--model {model}: must be one of {', '.join(PRESETS)}, or a config.json, or a folder that "
        "holds one"
    )


def _adapters(args: argparse.Namespace) -> Any:
    """The recipe of the adapters to train; None without --lora-rank."""
    from train.run import recipes

    if args.lora_rank is None:
        return None
    _choice("--base-dtype", args.base_dtype, allowed=recipes.BASE_DTYPES)
    return dataclasses.replace(
        recipes.sft_lora(),
        lora_rank=args.lora_rank,
        base_dtype=args.base_dtype,
        train_embeddings=args.train_embeddings,
    )


def _choice(name: str, value: Any, *, allowed: Any) -> None:
    if value not in allowed:
        names = ", ".join(str(x) for x in allowed if x is not None)
        raise UsageError(f"{name} {value}: must be one of {names}")


if __name__ == "__main__":
    raise SystemExit(main())
