"""Counts the work of a traced program per device: matrix products, attention kernels, residuals.

It is counted in a jaxpr, whose types say how arrays are sharded, so nothing needs compiling. Loops
count as often as they run. Unlike `Config.flops_per_token`, this includes recomputation.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from qwen_jax.meshes import sharding

# The number of products of [queries, keys] x H in each fused kernel; a backward kernel recomputes
# the scores.
KERNELS = {
    "flash_forward": 2,
    "flash_backward": 5,
    "flash_backward_queries": 3,
    "flash_backward_keys": 4,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in a run of a program.

    dots: the FLOPs of XLA's matrix products.
    kernels: the number of runs of each attention kernel, by name.
    kept: the bytes that forward loops over the layers keep for the backward pass.
    """

    dots: float
    kernels: Counter[str]
    kept: int

    def flops(self, product: float) -> float:
        """Return all FLOPs of the device, attention kernels included.

        product: the FLOPs of one product of queries and keys in a run of an attention kernel.
        """
        return self.dots + product * sum(KERNELS[name] * n for name, n in self.kernels.items())


def work(traced: jax.stages.Traced, layers: int) -> Work:
    """Count the work of a traced program on one device.

    traced: a `jax.stages.Traced`. layers: the number of layers; a loop with so many passes is a
    loop over the layers. A loop of unknown length counts as one pass; all branches of a conditional
    count.
    """
    dots, kernels, kept = 0.0, Counter(), 0
    whole = traced.jaxpr.jaxpr
    # A trace also has the gradients of frozen weights, which every compiler removes.
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


def _is_forward_loop(equation: JaxprEqn, layers: int) -> bool:
    """Return whether an equation of a jaxpr is a forward scan over the layers."""
    of_layers = equation.primitive.name == "scan" and equation.params["length"] == layers
    return of_layers and not equation.params["reverse"]


def _stacked(loop: Any) -> list[Any]:
    """Return the types of a scan's stacked outputs, which have one axis more than in one pass."""
    inner = loop.params["jaxpr"]
    passed = [x.aval for x in getattr(inner, "jaxpr", inner).outvars]
    made = [x.aval for x in loop.outvars]
    return [x for x, one in zip(made, passed, strict=True) if len(x.shape) > len(one.shape)]


def _equations(jaxpr: Jaxpr, times: int) -> Iterator[tuple[JaxprEqn, int]]:
    """Yield every equation of a jaxpr and how often it runs, without equations inside kernels.

    times: how often the jaxpr itself runs.
    """
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


def _dot(equation: JaxprEqn) -> float:
    """Return the FLOPs of a `dot_general` equation, a matrix product, on one device."""
    left, (out,) = equation.invars[0].aval, equation.outvars
    (summed, _), _ = equation.params["dimension_numbers"]
    shape = local_shape(left)
    return 2.0 * math.prod(local_shape(out.aval)) * math.prod(shape[axis] for axis in summed)


def local_shape(x: Any) -> tuple[int, ...]:
    """Return the shape of one device's part of an array, from its type or ShapeDtypeStruct."""
    place = getattr(x, "sharding", None)
    if place is None:
        return tuple(x.shape)
    named = place.spec.partitions
    entries = (*named, *[None] * (len(x.shape) - len(named)))
    parts = [math.prod(place.mesh.shape[a] for a in sharding.entries(e)) for e in entries]
    return tuple(size // n for size, n in zip(x.shape, parts, strict=True))


def nbytes(tree: PyTree[jax.ShapeDtypeStruct]) -> int:
    """Return the bytes that a tree of abstract arrays takes on one device."""
    return sum(math.prod(local_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
