"""GPTQ: rounds one matrix to a few bits, so that its products with typical inputs change least.

The matrix is rounded one input at a time, and weights of inputs that are still to come make up for
each input's errors. (Frantar et al., arXiv 2210.17323.) Then all codes are chosen again, one input
at a time, given all others. Pure functions of arrays: nothing here knows of layers, files or where
inputs come from. Outputs are rounded independently, so that `quantise` may have a part of them. The
loops over inputs are in `rounding.py`.
"""

import enum
import functools
import string
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, UInt8

from qwen_jax.leaves.grouped import BITS
from qwen_jax.leaves.weights import precision
from qwen_jax.quantise import factor, rounding

_HIGHEST = jax.lax.Precision.HIGHEST


class Order(enum.Enum):
    """The order in which inputs are rounded. The first ones are made up for by most others."""

    FILE = "file"  # as they lie in the matrix
    IMPORTANCE = "importance"  # the largest inputs first; groups are formed in this order
    GROUPS = "groups"  # groups of neighbours, that of the largest input first, and so inside each


@dataclass(frozen=True)
class Scheme:
    """How a matrix is rounded.

    bits: 4 or 8.
    group_size: how many inputs share a scale, for each output; -1 for all of them.
    symmetric: whether 2^(bits - 1) stands for 0; otherwise each group has its own zero.
    order: the order in which inputs are rounded.
    damping: what is added to the Hessian's diagonal, as a part of its mean. It is doubled until the
        Hessian can be factorised.
    passes: how often all codes are chosen again, given all others.

    Raises ValueError for other values.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    order: Order = Order.FILE
    damping: float = 0.01
    passes: int = 2

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits!r} must be 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size!r} must be at least 1, or -1 for all")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping: {self.damping!r} must lie between 0 and 1")
        if self.passes < 0:
            raise ValueError(f"passes: {self.passes!r} must be at least 0")

    def inputs_of_group(self, inputs: int) -> int:
        """Return the number of inputs in a group of a matrix with so many inputs.

        Raises ValueError where such groups do not divide them.
        """
        size = inputs if self.group_size == -1 else self.group_size
        if inputs % size:
            raise ValueError(f"group_size: {size} does not divide the {inputs} inputs of a matrix")
        return size


@struct.dataclass
class Hessian:
    """The mean of x x^T over inputs x of a matrix.

    It is half the Hessian of the mean squared error of an output, as a function of its weights.

    mean: float32 [inputs, inputs].
    count: float32 [], the number of inputs x.
    """

    mean: Float[Array, "inputs inputs"]
    count: Float[Array, ""]


@struct.dataclass
class Quantised:
    """A matrix of integers, whose element (i, o) is (codes[i, o] - zeros[g, o]) * scales[g, o].

    g is g_idx[i], the group of input i.

    codes: uint8 [inputs, outputs], unsigned.
    scales: float16 [groups, outputs].
    zeros: uint8 [groups, outputs], or None where 2^(bits - 1) stands for 0.
    g_idx: int32 [inputs].
    squared_errors: float32 [outputs], the mean square of the change of each output.
    squared_outputs: float32 [outputs], the mean square of each output of the float matrix.
    damping: float32 [], the damping with which the Hessian was factorised, as a part of the mean of
        its diagonal; NaN where none helped, because the Hessian is not finite.
    """

    codes: UInt8[Array, "inputs outputs"]
    scales: Float[Array, "groups outputs"]
    zeros: UInt8[Array, "groups outputs"] | None
    g_idx: Int32[Array, " inputs"]
    squared_errors: Float[Array, " outputs"]
    squared_outputs: Float[Array, " outputs"]
    damping: Float[Array, ""]

    @property
    def relative_error(self) -> Float[Array, ""]:
        """The relative output error, |X (W - Q)^T| / |X W^T| in Frobenius norms; 0 if X W^T is."""
        error, output = jnp.sum(self.squared_errors), jnp.sum(self.squared_outputs)
        return jnp.sqrt(jnp.where(output > 0, error / output, 0))


def no_inputs(inputs: int) -> Hessian:
    """Return the Hessian of a matrix with so many inputs before any x is added."""
    return Hessian(jnp.zeros((inputs, inputs), jnp.float32), jnp.zeros((), jnp.float32))


def accumulate(
    hessian: Hessian,
    x: Float[Array, "*tokens inputs"],
    *,
    counted: Bool[Array, "*tokens"] | None = None,
) -> Hessian:
    """Add inputs x of a matrix to its Hessian, which every device of a mesh has the whole of.

    counted: False for padding, which is left out; None to count all.
    """
    if counted is None:
        counted = jnp.ones(x.shape[:-1], bool)
    spec = jax.typeof(x).sharding.spec
    *tokens, inputs = spec.partitions
    if inputs is not None or spec.reduced:
        x = jax.reshard(x, P(*tokens, None))
    x = jnp.where(counted[..., None], x, 0)
    axes = string.ascii_uppercase[: x.ndim - 1]
    products = jnp.einsum(
        f"{axes}i,{axes}j->ij",
        x,
        x,
        precision=precision(x),
        preferred_element_type=jnp.float32,
        out_sharding=P(None, None) if any(tokens) else None,
    )
    total = hessian.count + jnp.sum(counted, dtype=jnp.float32)
    share = 1 / jnp.maximum(total, 1)
    return Hessian(hessian.mean * (hessian.count * share) + products * share, total)


@functools.partial(jax.jit, static_argnames="scheme")
def quantise(
    weight: Float[Array, "outputs inputs"],
    hessian: Float[Array, "inputs inputs"],
    *,
    scheme: Scheme,
) -> Quantised:
    """Round a matrix.

    hessian: the mean of x x^T over typical inputs x.

    Weights of inputs that are always 0 become 0. Raises ValueError where groups do not divide the
    inputs.
    """
    inputs = weight.shape[1]
    size = scheme.inputs_of_group(inputs)
    original = weight.astype(jnp.float32).T
    importance = jnp.diagonal(hessian)
    order = _ordered(importance, size=size, order=scheme.order)
    live = jnp.where(importance[order][:, None] > 0, original[order], 0)
    damped, root, damping = factor.factorised(hessian[order][:, order], scheme.damping)

    codes, grids = rounding.first(
        live, root, size=size, bits=scheme.bits, symmetric=scheme.symmetric
    )
    for _ in range(scheme.passes):
        codes = rounding.again(live, codes, grids=grids, hessian=damped)

    back = jnp.argsort(order)
    errors = original - rounding.floats(codes, grids)[back]
    g_idx = back // size
    if scheme.order is not Order.IMPORTANCE:  # groups are of neighbours, and go back to their place
        grids = jax.tree.map(lambda x: x[jnp.argsort(order[::size] // size)], grids)
        g_idx = jnp.arange(inputs) // size
    return Quantised(
        codes=codes.reshape(original.shape)[back],
        scales=grids.scale.astype(jnp.float16),
        zeros=None if scheme.symmetric else grids.zero.astype(jnp.uint8),
        g_idx=g_idx.astype(jnp.int32),
        squared_errors=_mean_squares(errors, hessian),
        squared_outputs=_mean_squares(original, hessian),
        damping=damping,
    )


def _mean_squares(matrix: Float[Array, "I O"], hessian: Float[Array, "I I"]) -> Float[Array, " O"]:
    """Return the mean square of each output of a matrix, over the inputs of a Hessian."""
    products = jnp.matmul(hessian, matrix, precision=_HIGHEST)
    return jnp.maximum(jnp.sum(products * matrix, axis=0), 0)


def _ordered(importance: Float[Array, " I"], *, size: int, order: Order) -> Int32[Array, " I"]:
    """Return the inputs in the order in which they are rounded. Groups lie side by side in it.

    importance: the mean squares of the inputs. size: the number of inputs in a group.
    """
    if order is Order.FILE:
        return jnp.arange(importance.shape[0])
    if order is Order.IMPORTANCE:
        return jnp.argsort(-importance)
    in_groups = importance.reshape(-1, size)
    within = jnp.argsort(-in_groups, axis=1)
    groups = jnp.argsort(-jnp.max(in_groups, axis=1))
    return (groups[:, None] * size + within[groups]).reshape(-1)
