"""What a traced program makes each device do: products, attention kernels, what scans keep.

Read from a jaxpr, whose types say how arrays are partitioned, so nothing is compiled for it and
loops count as often as they run. Unlike `Config.flops_per_token` it counts recomputation.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval

from qwen_jax.meshes import sharding

# Products of [queries, keys] x H that a fused kernel makes; a backward one computes scores again.
KERNELS = {
    "flash_forward": 2,
    "flash_backward": 5,
    "flash_backward_queries": 3,
    "flash_backward_keys": 4,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device. dots: FLOPs of the products that XLA makes; kernels: runs of each attention
    kernel by name; kept: bytes of what forward loops over `length` layers keep for the backward.
    """

    dots: float
    kernels: Counter[str]
    kept: int

    def flops(self, product: float) -> float:
        """All FLOPs, with `product` those of one product of an attention kernel's run."""
        return self.dots + product * sum(KERNELS[name] * n for name, n in self.kernels.items())


def work(traced: Any, layers: int) -> Work:
    """What a `jax.stages.Traced` does; a loop of unknown length counts one pass, a branch all."""
    dots, kernels, kept = 0.0, Counter(), 0
    whole = traced.jaxpr.jaxpr
    # Of weights that are not trained a trace has the gradients too, and no compiler.
    needed, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
    for equation, times in _equations(needed, 1):
        name = equation.params.get("name")
        if isinstance(name, str) and name in KERNELS:
            kernels[name] += times
        elif equation.primitive.name == "dot_general":
            dots += times * _dot(equation)
        elif _is_forward_loop(equation, layers):
            kept += sum(nbytes(x) for x in _stacked(equation))
    return Work(dots, kernels, kept)


def _is_forward_loop(equation: Any, layers: int) -> bool:
    of_layers = equation.primitive.name == "scan" and equation.params["length"] == layers
    return of_layers and not equation.params["reverse"]


def _stacked(loop: Any) -> list[Any]:
    """The types of what a scan stacks: an axis more than a pass returns."""
    inner = loop.params["jaxpr"]
    passed = [x.aval for x in getattr(inner, "jaxpr", inner).outvars]
    made = [x.aval for x in loop.outvars]
    return [x for x, one in zip(made, passed, strict=True) if len(x.shape) > len(one.shape)]


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """Every equation and how often it runs, those inside kernels left out."""
    for equation in jaxpr.eqns:
        yield equation, times
        if equation.params.get("name") in KERNELS or equation.primitive.name == "pallas_call":
            continue
        inside = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, inside)


def _dot(equation: Any) -> float:
    left, (out,) = equation.invars[0].aval, equation.outvars
    (summed, _), _ = equation.params["dimension_numbers"]
    shape = local_shape(left)
    return 2.0 * math.prod(local_shape(out.aval)) * math.prod(shape[axis] for axis in summed)


def local_shape(x: Any) -> tuple[int, ...]:
    """The shape of a device's part of an array's type (or of a ShapeDtypeStruct)."""
    place = getattr(x, "sharding", None)
    if place is None:
        return tuple(x.shape)
    named = place.spec.partitions
    entries = (*named, *[None] * (len(x.shape) - len(named)))
    parts = [math.prod(place.mesh.shape[a] for a in sharding.entries(e)) for e in entries]
    return tuple(size // n for size, n in zip(x.shape, parts, strict=True))


def nbytes(tree: Any) -> int:
    """Bytes that a device holds of a tree of abstract arrays."""
    return sum(math.prod(local_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
