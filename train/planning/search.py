"""Chooses the meshes, remat policies and batch sizes worth compiling, by a rough closed formula.

Compiling shows what fits and what it costs; the formula only decides what to try first. Knows no
compiler.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp

from qwen_jax import meshes
from qwen_jax.meshes import sharding
from qwen_jax.meshes.hardware import Gpu
from train.planning.programs import Setting
from train.planning.topology import Topology

# Bytes per parameter: weight, two moments and a gradient in float32, and a bfloat16 copy.
_STATE = 18
# What a layer keeps under each remat policy, in multiples of a bfloat16 activation: replicated over
# `tp` at width D, split over `tp` at width D, split over `tp` at width F. Without recomputation the
# gathered weights are kept as well.
_KEPT = {"full": (1, 0, 0), "projections": (2, 3, 2), "none": (12, 9, 4.5)}
# Executed FLOPs under each policy, relative to a step without recomputation.
_PASSES = {"full": 4 / 3, "projections": 1.03, "none": 1.0}
_HALVINGS = 10
_SMALLEST = 3  # candidates to return if none fits, so that their deficits can be shown
_SPLIT_OFF = "fsdp_outer"  # the axis that a torus mesh splits off the weights' axis for speed
_MOST_TENSOR = 16  # the most devices on `tp`: beyond it the products per device get too small


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting worth compiling, with a rough estimate of its cost.

    setting: the model, batch and options.
    mesh: the number of devices along each mesh axis.
    bytes: the memory per device.
    seconds: the time per token over all devices.
    """

    setting: Setting
    mesh: Mapping[str, int]
    bytes: float
    seconds: float


def candidates(setting: Setting, topology: Topology, *, decode: bool = False) -> list[Candidate]:
    """Return settings worth compiling, fastest first.

    decode: whether to plan prefill and decoding instead of training. Tries every mesh over all
    devices (see `_meshes`) and, for training, every remat policy, each with the requested batch and
    its halves until two fit. If nothing fits, returns the three settings that need least memory,
    each with the smallest batch of its mesh and policy.
    """
    batches = [setting.batch // 2**i for i in range(_HALVINGS) if setting.batch % 2**i == 0]
    policies = ["full"] if decode else list(_KEPT)
    found, large = [], []
    for sizes, remat in itertools.product(_meshes(topology, decode), policies):
        fitting: list[Candidate] = []
        smallest: list[Candidate] = []
        for batch in batches:
            one = dataclasses.replace(setting, batch=batch, remat=remat)
            if len(fitting) < 2 and _divides(one, sizes, decode=decode):
                rough = _rough_decode if decode else _rough
                candidate = Candidate(one, sizes, *rough(one, topology, sizes=sizes))
                if candidate.bytes <= topology.chip.usable:
                    fitting.append(candidate)
                else:
                    smallest = [candidate]
        found += fitting
        large += smallest
    if not found:
        return sorted(large, key=lambda x: (x.bytes, x.setting.batch))[:_SMALLEST]
    return sorted(found, key=lambda x: x.seconds)


def _divides(setting: Setting, sizes: Mapping[str, int], *, decode: bool) -> bool:
    """Return whether a setting divides over a mesh of these axis sizes.

    A mesh that splits the tokens of a row (`context`) counts only for training, and only if every
    device that rows are split over has a single row.
    """
    alone = setting.batch == math.prod(sizes[axis] for axis in sharding.BATCH)
    if sizes[sharding.CONTEXT] > 1 and (decode or not alone):
        return False
    try:
        setting.check(sizes)
    except ValueError:
        return False
    return True


def _meshes(topology: Topology, decode: bool) -> Iterator[dict[str, int]]:
    """Yield the meshes over all devices that are worth trying, as axis sizes.

    Every slice is a copy of the model, and every GPU host may be one. For decoding any group of
    devices may be a copy, which then gathers no weights for a token. `tp` stays within a host. An
    axis that only speeds up FSDP on a torus is left out here (`meshes.in_planes` chooses it).
    """
    chip, most, slices = topology.chip, _MOST_TENSOR, topology.slices
    copies = range(slices, topology.devices + 1, slices) if decode else [slices]
    if isinstance(chip, Gpu):
        most = min(chip.node, topology.lengths[1])
        copies = [*copies, slices * topology.lengths[0]]
    for sizes in meshes.of_size(topology.devices):
        suits = sizes[sharding.COPIES] in copies and sizes[_SPLIT_OFF] == 1
        if suits and sizes[sharding.TENSOR] <= most:
            yield sizes


def _rough(
    setting: Setting, topology: Topology, *, sizes: Mapping[str, int]
) -> tuple[float, float]:
    """Estimate roughly the bytes per device and the seconds per token of a training step.

    sizes: the number of devices along each mesh axis.
    """
    config, chip = setting.config, topology.chip
    tp, context = sizes[sharding.TENSOR], sizes[sharding.CONTEXT]
    rows = setting.batch / math.prod(sizes[axis] for axis in sharding.BATCH)
    tokens = rows * setting.length / context
    shards = tp * math.prod(sizes[axis] for axis in sharding.WEIGHTS)
    width = 2 * tokens * config.hidden_size
    whole, split, wide = _KEPT[setting.remat]
    whole = whole / tp if setting.splits_tokens(sizes)[0] else whole
    split += wide * config.intermediate_size / config.hidden_size
    kept = config.num_layers * width * (whole + split / tp)
    if setting.remat == "none":
        kept += 2 * config.num_params() / tp
    summed = jnp.dtype(setting.gradient_dtype).itemsize
    block = (config.num_params() / config.num_layers) * (2 + summed) / tp
    held = _STATE * config.num_params() / shards + kept + 6 * width + block
    compute = tokens * config.flops_per_token(setting.length) / tp * _PASSES[setting.remat]
    passes = 3 if setting.remat == "full" else 2
    # Weights are gathered in every forward pass, and their gradients are reduced once.
    gathered = (2 * (passes - 1) + summed) * config.num_params() / tp * (shards > tp)
    reduced = (passes + 2) * config.num_layers * width * 2 * (tp > 1)
    copies = 2 * summed * config.num_params() / shards * (sizes[sharding.COPIES] > 1)
    ring = 4 * config.num_layers * width / tp * (context - 1)
    across = gathered / _links(topology, shards // tp) + ring / chip.link
    across += copies / chip.network
    # Among settings that are equally fast with full overlap, prefer those that send less.
    seconds = max(compute / chip.flops, across) + across / 10 + reduced / _links(topology, tp)
    return held, seconds / (setting.batch * setting.length)


def _rough_decode(
    setting: Setting, topology: Topology, *, sizes: Mapping[str, int]
) -> tuple[float, float]:
    """Estimate roughly the bytes per device and the seconds per token of decoding.

    sizes: the number of devices along each mesh axis.
    """
    config, chip = setting.config, topology.chip
    tp = sizes[sharding.TENSOR]
    rows = setting.batch / math.prod(sizes[axis] for axis in sharding.BATCH)
    shards = tp * math.prod(sizes[axis] for axis in sharding.WEIGHTS)
    weights = 2 * config.num_params()
    kind = setting.cache_dtype or "bfloat16"
    cache = rows * setting.length * config.kv_bytes_per_token(kind) / tp
    gathered = weights / tp * (shards > tp)
    read = (weights / tp + cache + gathered) / chip.bandwidth
    seconds = read + gathered / _links(topology, shards // tp)
    return weights / shards + cache, seconds / setting.batch


def _links(topology: Topology, size: int) -> float:
    """Return the bytes/s of one device in collectives over `size` neighbouring devices."""
    chip = topology.chip
    if isinstance(chip, Gpu):
        return chip.link if size <= topology.lengths[1] else chip.network * topology.lengths[1]
    return 2 * chip.link
