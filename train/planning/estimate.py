"""Estimates the cost of a program: its memory against the chip's, its time from published rates.

Combines the compiled programs (`programs.py`), the chips' data (`hardware.py`), the links
(`topology.py`) and the arithmetic (`bounds.py`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from qwen_jax import meshes
from qwen_jax.meshes import sharding
from train.planning import bounds, collectives, programs, stored_weights
from train.planning import topology as topologies
from train.planning.bounds import Bound
from train.planning.collectives import Collective
from train.planning.compilation import Program
from train.planning.programs import Setting
from train.planning.topology import Topology
from train.run import parameters

CHUNK = 2048  # the most tokens of a prompt per prefill pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated memory and time of one program.

    task: "training", "decoding" or "prefill".
    setting: the model, batch and options of the program.
    topology: the devices that it is compiled for.
    mesh: the number of devices along each mesh axis.
    program: the compiled program.
    tokens: the number of tokens that the time covers: all tokens of a training step, one token per
        row when decoding, or all tokens of the prompts in prefill.
    model_flops: the FLOPs that the model needs, over all devices.
    hardware_flops: the FLOPs that are executed, over all devices.
    bound: the lower bound of the time, without links if the program's collectives are unknown; None
        if the compiler refused the program.
    """

    task: str
    setting: Setting
    topology: Topology
    mesh: Mapping[str, int]
    program: Program
    tokens: int
    model_flops: float
    hardware_flops: float
    bound: Bound | None

    @property
    def available(self) -> float:
        """The bytes of memory that the program may use on a device."""
        return self.program.memory.available or self.topology.chip.usable

    @property
    def over(self) -> float:
        """The bytes of memory that the program lacks on a device; 0 if it fits."""
        return max(0.0, self.program.memory.needed - self.available)

    @property
    def fits(self) -> bool:
        """Whether the compiler accepted the program and its memory suffices."""
        return self.bound is not None and not self.over

    @property
    def links_known(self) -> bool:
        """Whether the bound includes the time of collectives."""
        return self.program.collectives is not None

    @property
    def mfu(self) -> float:
        """The highest possible model FLOPs utilisation (MFU); 0 without a bound.

        It is the model's FLOPs, without recomputation, over the FLOPs that all devices can do at
        peak in the time of `bound`.
        """
        if self.bound is None:
            return 0.0
        peak = self.topology.devices * self.topology.chip.flops
        return self.model_flops / (peak * self.bound.seconds)

    @property
    def tokens_per_second(self) -> float:
        """The highest possible number of tokens per second, over all devices."""
        return 0.0 if self.bound is None else self.tokens / self.bound.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as an object for JSON."""
        setting, memory, chip = self.setting, self.program.memory, self.topology.chip
        bound = self.bound
        return {
            "task": self.task,
            "topology": str(self.topology),
            "devices": self.topology.devices,
            "mesh": meshes.describe(self.mesh),
            "batch": setting.batch,
            "length": setting.length,
            "attention": setting.attention,
            "attention_by_auto": setting.by_auto,
            "attention_passed_over": setting.passed_over,
            "accumulate": setting.accumulate,
            "lora_rank": setting.adapters.lora_rank if setting.adapters else 0,
            "remat": setting.remat if self.task == "training" else None,
            "sequence_parallel": setting.splits_tokens(self.mesh)[0]
            if self.task == "training"
            else None,
            "gradient_dtype": setting.gradient_dtype if self.task == "training" else None,
            "memory": {**memory.parts, "needed": memory.needed},
            "available": round(self.available),
            "hbm": round(chip.hbm),
            "fits": self.fits,
            "over": round(self.over),
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "collectives": None
            if self.program.collectives is None
            else [
                {"kind": x.kind, "axes": x.axes, "devices": x.size, "count": x.count}
                | {"bytes": x.bytes}
                for x in self.program.collectives
            ],
            "collectives_unread": self.program.unread,
            "links_known": self.links_known,
            "terms": None if bound is None else {x.name: x.seconds for x in bound.terms},
            "terms_in_step": None
            if bound is None
            else {x.name: x.in_step for x in bound.terms if x.in_step},
            "seconds": None if bound is None else bound.seconds,
            "serial_seconds": None if bound is None else bound.serial,
            "limit": None if bound is None else bound.limit,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "compile_seconds": round(self.program.seconds, 1),
        }


def training(setting: Setting, topology: Topology, *, sizes: Mapping[str, int]) -> Estimate:
    """Estimate a training step. sizes: the number of devices along each mesh axis.

    HBM traffic: weights, adapters, optimiser state, residuals and gathered weights are written and
    read once each.
    """
    mesh = topologies.mesh(topology, sizes)
    program = programs.training(setting, mesh)
    tokens = setting.batch * setting.length
    trained = parameters.abstract(setting.config, setting.adapters)
    needed = trained.flops_per_token(setting.length)
    hardware = program.work.flops(_product(setting, sizes))
    parts = program.memory.parts
    state = sum(parts.get(name, 0) for name in ("weights", "adapters", "optimiser"))
    moved = 2 * (state + parts.get("residuals", 0)) + 2 * _gathered(program.collectives or [])
    return Estimate(
        task="training",
        setting=setting,
        topology=topology,
        mesh=sizes,
        program=program,
        tokens=tokens,
        model_flops=tokens * needed,
        hardware_flops=hardware * topology.devices,
        bound=_bound(
            program, topology, mesh=mesh, flops=hardware, moved=moved, found=program.collectives
        ),
    )


def decoding(setting: Setting, topology: Topology, *, sizes: Mapping[str, int]) -> Estimate:
    """Estimate one decode step, which makes a token for each row.

    sizes: the number of devices along each mesh axis. HBM traffic: every weight except the
    embedding table and the whole cache are read once; gathered weights are written and read.
    """
    mesh = topologies.mesh(topology, sizes)
    program = programs.decoding(setting, mesh)
    config = setting.config
    weights = config.num_multiplied()
    needed = 2 * weights + 4 * config.num_heads * config.head_dim * sum(
        min(setting.length, w or setting.length) for w in config.windows
    )
    model_flops = setting.batch * needed
    parts = program.memory.parts
    share = stored_weights.multiplied_share(config, 2, form=setting.weights)
    read = parts["weights"] * share + parts["cache"]
    of_a_token = [x for x in program.collectives or [] if x.looped]
    moved = read + 2 * _gathered(of_a_token)
    each = model_flops / topology.devices
    return Estimate(
        task="decoding",
        setting=setting,
        topology=topology,
        mesh=sizes,
        program=program,
        tokens=setting.batch,
        model_flops=model_flops,
        hardware_flops=model_flops,
        bound=_bound(program, topology, mesh=mesh, flops=each, moved=moved, found=of_a_token),
    )


def prefill(setting: Setting, topology: Topology, *, sizes: Mapping[str, int]) -> Estimate:
    """Estimate the prefill of prompts of `setting.length` tokens, in chunks.

    sizes: the number of devices along each mesh axis. HBM traffic per chunk: all weights and half
    of the cache are read once; gathered weights are written and read.
    """
    mesh = topologies.mesh(topology, sizes)
    chunk = min(CHUNK, setting.length)
    program = programs.prefill(setting, mesh, chunk=chunk)
    chunks = -(-setting.length // chunk)
    times = chunks * program.runs
    every = [
        dataclasses.replace(x, count=round(times * x.count), bytes=round(times * x.bytes))
        for x in program.collectives or []
    ]
    tokens = setting.batch * setting.length
    model_flops = tokens * setting.config.flops_per_token(setting.length) / 3
    parts = program.memory.parts
    moved = chunks * (parts["weights"] + parts["cache"] / 2) + 2 * _gathered(every)
    each = model_flops / topology.devices
    return Estimate(
        task="prefill",
        setting=setting,
        topology=topology,
        mesh=sizes,
        program=program,
        tokens=tokens,
        model_flops=model_flops,
        hardware_flops=model_flops,
        bound=_bound(program, topology, mesh=mesh, flops=each, moved=moved, found=every),
    )


def _bound(
    program: Program,
    topology: Topology,
    *,
    mesh: Mesh,
    flops: float,
    moved: float,
    found: list[Collective] | None,
) -> Bound | None:
    """Return the lower bound of a program's time, or None if the compiler refused the program.

    flops: the FLOPs of a device.
    moved: the bytes of a device's HBM traffic.
    found: the program's collectives, or None if they are unknown.
    """
    if program.refused:
        return None
    chip, network = topology.chip, topology.network if program.collectives is not None else ""
    found = found or []
    links = {x.axes: topologies.links(topology, mesh, axes=x.axes) for x in found}
    return bounds.bound(
        flops,
        chip.flops,
        moved=moved,
        bandwidth=chip.bandwidth,
        collectives=found,
        links=links,
        network=network,
    )


def _gathered(found: list[collectives.Collective]) -> int:
    """Return the bytes that all-gathers write to HBM, from which later operations read them."""
    return sum(x.bytes for x in found if x.kind == "all-gather")


def _product(setting: Setting, sizes: Mapping[str, int]) -> float:
    """Return the FLOPs of one product of queries and keys in a run of an attention kernel.

    They are the FLOPs of one device, averaged over the layers. sizes: the number of devices along
    each mesh axis.
    """
    config = setting.config
    rows = setting.batch / math.prod(sizes[axis] for axis in sharding.BATCH)
    length = setting.length / sizes[sharding.CONTEXT]
    seen = [config.mean_keys(setting.length, window) / setting.length for window in config.windows]
    keys = length * sum(seen) / len(seen)  # on average this share holds for a ring's blocks, too
    heads = config.num_heads / sizes[sharding.TENSOR]
    return 2 * rows * length * heads * keys * config.head_dim
