"""Estimates what a serving engine holds on some devices, and how fast its steps can be at most.

Combines the compiled programs of the engine (`engine_programs.py`), the chips' data and links
(`topology.py`), and the arithmetic of bounds (`bounds.py`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax import meshes
from qwen_jax.meshes import sharding
from train.planning import bounds, engine_programs, stored_weights
from train.planning import topology as topologies
from train.planning.bounds import Bound
from train.planning.collectives import Collective
from train.planning.engine_programs import STATE, Engine, Run, Serving
from train.planning.topology import Topology

LENGTHS = (2048, 8192)  # of the requests that a plan counts, beside the longest ones
PREFILL = ("prefill", "prefill, first token")  # calls that compute a prompt


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests of one length, prompt and new tokens together.

    length: their tokens.
    fitting: the requests whose pages fit into the cache, over all devices.
    rows: those that decode at a time.
    decoding: the lower bound of the time of a decode step of so many rows at their full length.
    prefill: the lower bound of the time in which a prompt of this length is computed alone.
    """

    length: int
    fitting: int
    rows: int
    decoding: Bound
    prefill: Bound

    @property
    def tokens_per_second(self) -> float:
        """The highest possible number of new tokens per second, over all devices."""
        return self.rows / self.decoding.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the load as an object for JSON."""
        return {
            "length": self.length,
            "requests": self.fitting,
            "rows": self.rows,
            "seconds": self.decoding.seconds,
            "serial_seconds": self.decoding.serial,
            "limit": self.decoding.limit,
            "tokens_per_second": self.tokens_per_second,
            "prompt_seconds": self.prefill.seconds,
            "prompt_limit": self.prefill.limit,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimated memory and times of an engine.

    serving: the model and options.
    topology: the devices that the engine is compiled for.
    mesh: the number of devices along each mesh axis.
    engine: its compiled programs, with as many pages as an engine takes by default.
    parts: the bytes on a device by name. "temporaries", "outputs" and "batch" are those of the
        program that needs the most of them, "program" is the instructions of all programs.
    largest: the program that needs the most.
    available: the bytes of memory that the engine may use on a device.
    most: the most pages that fit in each part of the batch; 0 if the engine does not fit.
    """

    serving: Serving
    topology: Topology
    mesh: Mapping[str, int]
    engine: Engine
    parts: Mapping[str, int]
    largest: Run
    available: float

    @property
    def needed(self) -> int:
        """The bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def over(self) -> float:
        """The bytes of memory that the engine lacks on a device; 0 if it fits."""
        return max(0.0, self.needed - self.available)

    @property
    def fits(self) -> bool:
        """Whether the compiler accepted all programs and their memory suffices."""
        return not self.over and not any(run.program.refused for run in self.engine.runs)

    @property
    def replicas(self) -> int:
        """The parts into which the mesh splits the batch, each with its own pages."""
        return math.prod(self.mesh[axis] for axis in sharding.BATCH)

    @property
    def page(self) -> float:
        """The bytes of a page on a device, in all layers, with what the layout adds."""
        return self.parts["cache"] / self.engine.shape.pages

    @property
    def most(self) -> int:
        """The most pages that fit in each part of the batch; temporaries do not grow with them."""
        if not self.fits:
            return 0
        return self.engine.shape.pages + int((self.available - self.needed) // self.page)

    def tokens(self, pages: int) -> int:
        """Return the tokens that so many pages in each part of the batch hold, over all parts."""
        return (pages - 1) * self.engine.shape.size * self.replicas  # page 0 is nobody's

    @property
    def seconds(self) -> float:
        """The time it took to compile all programs."""
        return sum(run.program.seconds for run in self.engine.runs)

    def loads(self) -> list[Load]:
        """Return the bounds of times for requests of each length of which at least one fits."""
        longest, shape = self.serving.max_length, self.engine.shape
        found = []
        for length in sorted({x for x in LENGTHS if x < longest} | {longest}):
            fitting = max(0, self.most - 1) // -(-length // shape.size) * self.replicas
            if rows := min(fitting, shape.rows):
                found.append(Load(length, fitting, rows, *_bounds(self, length, rows=rows)))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the plan as an object for JSON."""
        shape, serving = self.engine.shape, self.serving
        return {
            "task": "serving",
            "topology": str(self.topology),
            "devices": self.topology.devices,
            "mesh": meshes.describe(self.mesh),
            "rows": shape.rows,
            "max_length": serving.max_length,
            "page": shape.size,
            "chunk": shape.chunk,
            "dtype": serving.dtype,
            "cache_dtype": serving.cache_dtype,
            "attention": serving.attention,
            "memory": {**self.parts, "needed": self.needed},
            "largest_program": f"{self.largest.call}: {self.largest.name}",
            "available": round(self.available),
            "fits": self.fits,
            "over": round(self.over),
            "pages": shape.pages,
            "tokens": self.tokens(shape.pages) if self.fits else 0,
            "most_pages": self.most,
            "most_tokens": self.tokens(self.most) if self.fits else 0,
            "page_bytes": round(self.page),
            "requests": [x.to_json() for x in self.loads()] if self.fits else [],
            "programs": [
                {"call": x.call, "name": x.name, "times": x.times}
                | {"temporaries": x.program.memory.parts["temporaries"]}
                | {"compile_seconds": round(x.program.seconds, 1)}
                for x in self.engine.runs
            ],
        }


def plan(serving: Serving, topology: Topology, *, sizes: Mapping[str, int], room: int) -> Plan:
    """Compile an engine's programs, and estimate its memory and times.

    sizes: the number of devices along each mesh axis.
    room: the bytes for pages on each device.

    Raises ValueError for sizes that do not fit each other, or a cache of less than two pages.
    """
    mesh = topologies.mesh(topology, sizes)
    shape = serving.shape(sizes, room=room)
    engine = engine_programs.engine(serving, shape, mesh=mesh)
    refused = [x.program.memory for x in engine.runs if x.program.refused]
    available = min([topology.chip.usable, *(x.available or math.inf for x in refused)])
    parts, largest = _memory(engine)
    return Plan(
        serving=serving,
        topology=topology,
        mesh=sizes,
        engine=engine,
        parts=parts,
        largest=largest,
        available=available,
    )


def _memory(engine: Engine) -> tuple[dict[str, int], Run]:
    """Return an engine's bytes on a device by name, and the program that needs the most."""
    made = {x.name: x for x in engine.of_call(STATE)}
    rows = made.pop("make").program.memory.parts
    layers = [(x.times, x.program.memory.parts) for x in made.values()]
    (decode,) = engine.of_call("decode")
    held = decode.program.memory.parts
    cache = sum(times * parts["outputs"] for times, parts in layers)
    # Of the padding of all arguments, that of pages and rows is in their own sizes.
    padding = held.get("padding", 0) - (cache - held["cache"]) - (rows["outputs"] - held["rows"])

    def own(run: Run) -> int:
        parts = run.program.memory.parts
        return sum(parts.get(name, 0) for name in ("temporaries", "outputs", "batch"))

    largest = max((x for x in engine.runs if x.call != STATE), key=own)
    most = largest.program.memory.parts
    return {
        "weights": engine.weights,
        "cache": cache,
        "rows": rows["outputs"],
        "padding": max(0, padding),
        **{name: most.get(name, 0) for name in ("temporaries", "outputs", "batch")},
        "program": sum(x.program.memory.parts.get("program", 0) for x in engine.runs),
    }, largest


def _bounds(plan: Plan, length: int, *, rows: int) -> tuple[Bound, Bound]:
    """Return the lower bounds of a decode step, and of the prefill of a prompt alone.

    length: the tokens of the prompt, and of each row in the step. rows: those that decode.

    HBM traffic of a step: every weight except the embedding table, and the pages of the rows, are
    read once. Of a prompt: for each chunk the weights of the layers, and the pages before it. A
    step computes the products with weights for all R rows.
    """
    config, shape, sizes = plan.serving.config, plan.engine.shape, plan.mesh
    devices = math.prod(sizes.values())
    head = config.vocab_size * config.hidden_size
    stored = {"item_bytes": jnp.dtype(plan.serving.dtype).itemsize, "form": plan.serving.weights}
    share = stored_weights.multiplied_share(config, **stored)
    of_layers = share - stored_weights.table_share(config, **stored)
    per_token = plan.page / shape.size
    seen = sum(min(length, window or length) for window in config.windows)  # over all layers
    step = 2 * config.num_multiplied() * shape.rows
    step += 4 * config.num_heads * config.head_dim * seen * rows
    seen /= config.num_layers
    read = plan.engine.weights * share + per_token * seen * rows / plan.replicas
    mesh = topologies.mesh(plan.topology, sizes)
    decoding = _bound(
        plan,
        mesh,
        flops=step / devices,
        moved=read,
        found=_collectives(plan.engine.of_call("decode")),
    )
    chunks = -(-length // shape.chunk)
    forward = length * (config.flops_per_token(length) / 3 - 2 * head)
    before = per_token * seen / 2
    prefill = _bound(
        plan,
        mesh,
        flops=forward * plan.replicas / devices,
        moved=chunks * (plan.engine.weights * of_layers + before),
        found=[
            dataclasses.replace(x, count=chunks * x.count, bytes=chunks * x.bytes)
            for x in _collectives(plan.engine.of_call(*PREFILL))
        ],
    )
    return decoding, prefill


def _collectives(runs: Iterable[Run]) -> list[Collective]:
    """Return the collectives of some programs, as often as their calls run them."""
    return [
        dataclasses.replace(x, count=run.times * x.count, bytes=run.times * x.bytes)
        for run in runs
        for x in run.program.collectives or []
    ]


def _bound(plan: Plan, mesh: Mesh, *, flops: float, moved: float, found: list[Collective]) -> Bound:
    """Return a lower bound of time from a device's FLOPs, HBM traffic and collectives."""
    chip = plan.topology.chip
    gathered = sum(x.bytes for x in found if x.kind == "all-gather")
    return bounds.bound(
        flops,
        chip.flops,
        moved=moved + 2 * gathered,
        bandwidth=chip.bandwidth,
        collectives=found,
        links={x.axes: topologies.links(plan.topology, mesh, axes=x.axes) for x in found},
        network=plan.topology.network,
    )
