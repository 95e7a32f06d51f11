"""Makes the plan that the command line of `train/plan.py` asks for.

Checks the values of the options, chooses the mesh or searches for settings, and prints the
estimates. Environment variables that jax and the compilers read are set before this is imported.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence

from qwen_jax import attention, meshes
from qwen_jax.attention import cache as kv
from qwen_jax.checkpoint import directory
from qwen_jax.config import Config
from qwen_jax.config.presets import PRESETS
from qwen_jax.meshes import options, sharding
from qwen_jax.runtime import command
from qwen_jax.runtime.command import UsageError
from train import step
from train.planning import attempts, report, search, serving_planner, stored_weights
from train.planning import topology as topologies
from train.planning.estimate import Estimate
from train.planning.programs import Setting
from train.planning.search import Candidate
from train.planning.topology import Topology
from train.run import recipes
from train.run.recipes import Recipe


def run(args: argparse.Namespace) -> None:
    """Compile the programs of a plan, or of a search, and print their estimates.

    args: the command line of `train/plan.py`. Raises UsageError for values that are not allowed,
    and ValueError if the compiler's package is not installed.
    """
    try:
        topology = topologies.parse(args.topology)
    except ValueError as error:
        raise UsageError(str(error)) from None
    topologies.prepare(topology.chip.platform)
    if args.serve:
        serving_planner.run(args, topology, config=_config(args.model))
        return
    setting = _setting(args, topology)
    if args.search:
        tried = search.candidates(setting, topology, decode=args.decode)[: args.tries]
        if not tried:
            raise UsageError(
                f"--search: no mesh of {topology.devices} devices divides this model and "
                f"--batch {args.batch} or its halves; give another --batch or --topology"
            )
        found = sorted(compiled(tried, topology, decode=args.decode), key=rank)
    else:
        sizes = _mesh(args, setting, topology=topology)
        found = list(attempts.estimates(setting, topology, sizes=sizes, decode=args.decode))
    if args.json:
        print(json.dumps({"model": args.model, "plans": [x.to_json() for x in found]}))
    elif args.search:
        print(report.ranking(found))
    else:
        print("\n\n".join(report.text(x, args.model) for x in found))


def compiled(
    candidates: Sequence[Candidate], topology: Topology, *, decode: bool
) -> list[Estimate]:
    """Compile the candidates of a search, and return their estimates.

    decode: whether to estimate prefill and decoding instead of training. A candidate that does not
    compile is reported and left out; if none compiles, the last error is raised.
    """
    found, failed = list[Estimate](), None
    for number, one in enumerate(candidates, 1):
        label = f"{number} of {len(candidates)}: "
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


def rank(x: Estimate) -> tuple[str, bool, float, int, float]:
    """Return the key by which a search sorts its estimates, best first.

    Programs that fit come first, then those that lack the least memory. Equal ones are sorted by
    tokens/s and, if these are within 1 % of each other, by tokens/s if nothing overlaps.
    """
    serial = x.tokens / x.bound.serial if x.bound else 0.0
    percents = round(100 * math.log(x.tokens_per_second)) if x.bound else 0
    return x.task, not x.fits, x.over, -percents, -serial


def _mesh(args: argparse.Namespace, setting: Setting, *, topology: Topology) -> dict[str, int]:
    """Return the number of devices along each mesh axis that --mesh names; 1 along all other axes.

    Raises UsageError for an axis that decoding cannot use.
    """
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


def _setting(args: argparse.Namespace, topology: Topology) -> Setting:
    """Return the setting to plan. Raises UsageError for a value that is not allowed."""
    config = _config(args.model)
    _check_choice("--remat", args.remat, allowed=step.REMAT)
    _check_choice("--gradient-dtype", args.gradient_dtype, allowed=step.FLOATS)
    _check_choice("--cache-dtype", args.cache_dtype, allowed=(None, *kv.DTYPES))
    _check_choice("--attention", args.attention, allowed=("auto", *attention.IMPLEMENTATIONS))
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
        weights=args.weights,
        kernel=stored_weights.KERNELS.get(topology.chip.platform),
    )


def _config(model: str) -> Config:
    """Return the config of a preset, or of a config.json or a folder with one."""
    if model in PRESETS:
        return PRESETS[model]
    if (stored := directory.config_at(model)) is not None:
        return Config.read(stored)
    raise UsageError(
        f"--model {model}: must be one of {', '.join(PRESETS)}, or a config.json, or a folder that "
        "holds one"
    )


def _adapters(args: argparse.Namespace) -> Recipe | None:
    """Return the recipe of the adapters to train; None without --lora-rank."""
    if args.lora_rank is None:
        return None
    _check_choice("--base-dtype", args.base_dtype, allowed=recipes.BASE_DTYPES)
    return dataclasses.replace(
        recipes.sft_lora(),
        lora_rank=args.lora_rank,
        base_dtype=args.base_dtype,
        train_embeddings=args.train_embeddings,
    )


def _check_choice(option: str, value: str | None, *, allowed: Iterable[str | None]) -> None:
    """Raise UsageError unless the value of an option is one of those allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        names = ", ".join(name for name in allowed if name is not None)
        raise UsageError(f"{option} {value}: must be one of {names}")
