"""Makes the plan of a serving engine: `python train/plan.py --serve`.

Checks the options, chooses the meshes to compile, and says which mesh would do where one does not.
Knows how much a mesh holds by arithmetic; what is compiled is estimated by `serving.py`.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from qwen_jax import attention, meshes
from qwen_jax.config import Config
from qwen_jax.engine import from_model
from qwen_jax.meshes import options, sharding
from qwen_jax.meshes.hardware import Gpu
from qwen_jax.runtime import command
from qwen_jax.runtime.command import UsageError
from train.planning import report, serving, serving_report, stored_weights
from train.planning.engine_programs import Serving
from train.planning.serving import LENGTHS, Plan
from train.planning.topology import Topology

_DTYPES = ("float32", "bfloat16", "float16")
_MOST_TENSOR = 16  # the most devices on `tp`: beyond it the products per device get too small


def run(args: argparse.Namespace, topology: Topology, *, config: Config) -> None:
    """Compile an engine's programs on a mesh, or on the likeliest ones, and print the plan.

    args: the command line of `train/plan.py`. Raises UsageError for values that are not allowed,
    and ValueError if no mesh holds the model and two pages.
    """
    asked = _serving(args, topology, config=config)
    if args.mesh is not None:
        tried = [_checked(asked, topology, sizes=options.mesh_sizes(args.mesh))]
    else:
        tried = likely(asked, topology)[: args.tries]
        if not tried:
            raise ValueError(f"--topology {topology}: {_too_small(asked, topology)}")
    found = sorted(_compiled(tried, asked, topology=topology), key=_rank)
    for each in found:
        _warn(each)
    if args.json:
        print(json.dumps({"model": args.model, "plans": [x.to_json() for x in found]}))
        return
    if len(found) > 1:
        print(f"{serving_report.ranking(found)}\n")
    print(serving_report.text(found[0], args.model, by_auto=args.attention == "auto"))


def _serving(args: argparse.Namespace, topology: Topology, *, config: Config) -> Serving:
    """Return the engine to plan. Raises UsageError for a value that is not allowed."""
    for option, value, allowed in (
        ("--dtype", args.dtype, _DTYPES),
        ("--cache-dtype", args.cache_dtype, (None, "int8")),
        ("--attention", args.attention, ("auto", *attention.IMPLEMENTATIONS)),
    ):
        if value not in allowed:
            names = ", ".join(name for name in allowed if name is not None)
            raise UsageError(f"{option} {value}: must be one of {names}")
    longest = max(config.max_position_embeddings, config.seq_length)
    return Serving(
        config=config,
        max_length=args.max_length or longest,
        attention=topology.chip.kernel if args.attention == "auto" else args.attention,
        rows=args.rows,
        page=args.page,
        chunk=args.chunk,
        cache_dtype=args.cache_dtype,
        dtype=args.dtype,
        weights=args.weights,
        kernel=stored_weights.KERNELS.get(topology.chip.platform),
    )


def _weight_bytes(serving: Serving) -> float:
    """Return the bytes of all weights."""
    item = jnp.dtype(serving.dtype).itemsize
    return stored_weights.size(serving.config, item, form=serving.weights)


def _room(serving: Serving, topology: Topology, *, sizes: Mapping[str, int]) -> int:
    """Return the bytes that an engine takes for pages on a device; below 0 if weights do not fit.

    sizes: the number of devices along each mesh axis.
    """
    shards = math.prod(sizes[axis] for axis in (*sharding.WEIGHTS, sharding.TENSOR))
    weights = _weight_bytes(serving) / shards
    return int(from_model.SHARE * (topology.chip.usable - weights))


def _checked(
    serving: Serving, topology: Topology, *, sizes: Mapping[str, int]
) -> Mapping[str, int]:
    """Return the sizes of a mesh on which an engine runs and fits, so far as arithmetic can tell.

    Raises ValueError, with the nearest mesh that does, for another.
    """
    named = meshes.describe(sizes)
    if sizes[sharding.CONTEXT] > 1:
        raise UsageError(
            f"--mesh {named}: axis {sharding.CONTEXT} splits training only; with --serve use tp, "
            "data and fsdp"
        )
    meshes.check(serving.config.sizes, sizes)
    room = _room(serving, topology, sizes=sizes)
    try:
        serving.shape(sizes, room=max(0, room))
    except ValueError as error:
        if not str(error).startswith("cache_gb"):
            raise UsageError(f"--{error}") from None
        page = serving.shape(sizes, room=1 << 62).size
        raise ValueError(
            f"--mesh {named}: {_lacking(serving, topology, sizes=sizes)} on a device of "
            f"{topology}, with no room for 2 pages of {page} tokens; "
            f"{_nearest(serving, topology, sizes=sizes)}"
        ) from None
    return sizes


def _lacking(serving: Serving, topology: Topology, *, sizes: Mapping[str, int]) -> str:
    """Say how much memory the weights take on a device, and how much there is."""
    room = _room(serving, topology, sizes=sizes)
    usable = topology.chip.usable
    weights = usable - room / from_model.SHARE
    return f"weights take {weights / 1e9:.2f} of {usable / 1e9:.2f} GB"


def _nearest(serving: Serving, topology: Topology, *, sizes: Mapping[str, int]) -> str:
    """Name the mesh nearest to `sizes` that holds the model, or say that there is none."""
    found = likely(serving, topology)
    if not found:
        return _too_small(serving, topology)

    def moved(mesh: Mapping[str, int]) -> float:
        return sum(abs(math.log2(mesh[axis] / sizes[axis])) for axis in sharding.AXES)

    return f"the nearest mesh that does is {meshes.describe(min(found, key=moved))}"


def _too_small(serving: Serving, topology: Topology) -> str:
    """Say that no mesh of a topology holds an engine, and what may."""
    usable = topology.chip.usable
    weights = _weight_bytes(serving)
    return (
        f"no mesh of tp and data over {topology.devices} devices of {usable / 1e9:.1f} GB holds "
        f"{weights / 1e9:.1f} GB of weights and 2 pages: take more or larger devices, or fewer "
        "--rows"
    )


def likely(serving: Serving, topology: Topology) -> list[Mapping[str, int]]:
    """Return the meshes of tp and data that hold the model and a request, fastest first.

    If none holds a request of `serving.max_length` tokens, returns those that hold two pages.
    """
    found: list[tuple[bool, float, Mapping[str, int]]] = []
    for sizes in _meshes(serving, topology):
        try:
            shape = serving.shape(sizes, room=max(0, _room(serving, topology, sizes=sizes)))
        except ValueError:
            continue
        found.append(
            (shape.pages <= shape.width, -_rough(serving, sizes, pages=shape.pages), sizes)
        )
    whole = [x for x in found if not x[0]]
    return [sizes for *_, sizes in sorted(whole or found, key=lambda x: x[:2])]


def _meshes(serving: Serving, topology: Topology) -> Iterator[Mapping[str, int]]:
    """Yield the meshes over all devices that split nothing but heads and rows."""
    most = _MOST_TENSOR
    if isinstance(topology.chip, Gpu):
        most = min(topology.chip.node, topology.lengths[1])
    for sizes in meshes.of_size(topology.devices, serving.config.sizes):
        split = math.prod(sizes[axis] for axis in sharding.AXES)
        plain = split == sizes[sharding.COPIES] * sizes[sharding.TENSOR]
        whole = sizes[sharding.COPIES] % topology.slices == 0
        if plain and whole and sizes[sharding.TENSOR] <= most:
            yield sizes


def _rough(serving: Serving, sizes: Mapping[str, int], *, pages: int) -> float:
    """Return rows over the bytes that a device reads for a step of 2,048 tokens of context each.

    pages: those of each part of the batch.
    """
    shape = serving.shape(sizes, room=1 << 62)
    replicas = math.prod(sizes[axis] for axis in sharding.BATCH)
    rows = min(shape.rows // replicas, max(1, (pages - 1) * shape.size // LENGTHS[0]))
    config, tp = serving.config, sizes[sharding.TENSOR]
    weights = config.num_multiplied() * jnp.dtype(serving.dtype).itemsize / tp
    kind = serving.cache_dtype or serving.dtype
    return rows * replicas / (weights + rows * LENGTHS[0] * config.kv_bytes_per_token(kind) / tp)


def _compiled(
    tried: list[Mapping[str, int]], asked: Serving, *, topology: Topology
) -> Iterator[Plan]:
    """Compile an engine on each of some meshes; leave out those that do not compile.

    If none compiles, the last error is raised.
    """
    failed, any_found = None, False
    for number, sizes in enumerate(tried, 1):
        label = f"{number} of {len(tried)}: " if len(tried) > 1 else ""
        named = f"mesh {meshes.describe(sizes)}, attention {asked.attention}"
        try:
            with report.waiting(f"{label}compiling for {topology}: serving, {named}"):
                room = _room(asked, topology, sizes=sizes)
                yield serving.plan(asked, topology, sizes=sizes, room=room)
            any_found = True
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            first = str(error).partition("\n")[0][:300]
            failed = ValueError(
                f"{named}: the engine does not compile: {first}; take another --mesh, --page or "
                "--chunk, or --attention xla"
            )
            command.say(str(failed))
    if failed and not any_found:
        raise failed


def _rank(plan: Plan) -> tuple[bool, float, float]:
    """Return the key that sorts plans: those that fit, the fastest first."""
    loads = plan.loads() if plan.fits else []
    return not plan.fits, plan.over, -loads[0].tokens_per_second if loads else 0.0


def _warn(plan: Plan) -> None:
    """Say what does not fit, by name."""
    shape, named = plan.engine.shape, meshes.describe(plan.mesh)
    if not plan.fits:
        command.say(
            f"warning: mesh {named} does not fit: {plan.largest.call} ({plan.largest.name}) needs "
            f"{plan.over / 1e9:.2f} GB more; "
            f"{_nearest(plan.serving, plan.topology, sizes=plan.mesh)}"
        )
    elif (plan.most - 1) < shape.width:
        command.say(
            f"warning: mesh {named}: a request of --max-length {plan.serving.max_length} tokens "
            f"does not fit, as the cache of a part of the batch holds "
            f"{(plan.most - 1) * shape.size} tokens; take more devices on tp, a smaller "
            "--max-length, or --cache-dtype int8"
        )
