"""Rounds one matrix on a mesh, each device some of its outputs, and makes what is stored of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen_jax.leaves import grouped
from qwen_jax.leaves.grouped import WORD, Grouped
from qwen_jax.leaves.weights import Weight
from qwen_jax.meshes import sharding
from qwen_jax.quantise import algorithm
from qwen_jax.quantise.algorithm import Hessian, Order, Quantised, Scheme


class Stored(NamedTuple):
    """An array that is stored of a rounded matrix: its shape, its dtype, and its sharding."""

    shape: tuple[int, ...]
    dtype: str
    place: NamedSharding


@struct.dataclass
class Rounded:
    """A rounded matrix.

    leaf: the matrix as it is stored, whose arrays are divided by outputs (`layout`).
    error: float32 [], the relative output error.
    squares: float32 [2], the mean squares of the changes of all outputs, and of the outputs.
    damping: float32 [], as in `algorithm.Quantised`.
    """

    leaf: Grouped
    error: Float[Array, ""]
    squares: Float[Array, "2"]
    damping: Float[Array, ""]


def layout(shape: tuple[int, ...], scheme: Scheme, *, mesh: Mesh) -> dict[str, Stored]:
    """Return the arrays that are stored of a rounded matrix [outputs, inputs], by field."""
    outputs, inputs = shape
    columns = NamedSharding(mesh, P(None, _columns(outputs, mesh)))
    grid = inputs // scheme.inputs_of_group(inputs), outputs
    found = {
        "codes": Stored((inputs * scheme.bits // WORD, outputs), "uint32", columns),
        "scales": Stored(grid, "float16", columns),
    }
    if not scheme.symmetric:
        found["zeros"] = Stored(grid, "uint8", columns)
    if scheme.order is Order.IMPORTANCE:
        found["order"] = Stored((inputs,), "int32", NamedSharding(mesh, P(None)))
    return found


def leaf_of(arrays: dict[str, jax.Array], scheme: Scheme) -> Grouped:
    """Return a rounded matrix from its stored arrays, by field."""
    weights = {name: Weight(array, letters=_letters(name)) for name, array in arrays.items()}
    zeros, order = weights.get("zeros"), weights.get("order")
    return Grouped(weights["codes"], weights["scales"], zeros, order, scheme.bits)


def _letters(field: str) -> str:
    """Return axis letters for a stored array, which no partitioning is derived from."""
    return "I" if field == "order" else "IO"


def floats(leaf: Grouped, like: Weight, *, dtype: DTypeLike) -> Weight:
    """Return a rounded matrix as floats, in the place of the weight that it was.

    dtype: the dtype of passes: the floats are those that a product with the leaf would use.
    """
    plain = grouped.plain(leaf, dtype)
    return Weight(
        jax.device_put(plain.get_value(), like.get_value().sharding), letters=like.letters
    )


@functools.partial(jax.jit, static_argnames="scheme")
def rounded(weight: Weight, hessian: Hessian, *, scheme: Scheme) -> Rounded:
    """Round a weight [outputs, inputs], on the mesh in force.

    hessian: whole on every device.
    """
    columns = _columns(weight.shape[0], jax.sharding.get_abstract_mesh())
    by_output: Any = P(columns)  # partitionings stand in the places of arrays
    matrix: Any = P(None, columns)
    whole: Any = P()
    made = Quantised(
        codes=matrix,
        scales=matrix,
        zeros=None if scheme.symmetric else matrix,
        g_idx=whole,
        squared_errors=by_output,
        squared_outputs=by_output,
        damping=whole,
    )
    local = jax.shard_map(
        functools.partial(algorithm.quantise, scheme=scheme), out_specs=made, check_vma=False
    )
    found = local(
        jax.reshard(weight[...], P(columns, None)), jax.reshard(hessian.mean, P(None, None))
    )
    arrays = {"scales": found.scales}
    codes = found.codes
    if scheme.order is Order.IMPORTANCE:  # codes lie in memory as their groups do
        order = jnp.argsort(found.g_idx, stable=True).astype(jnp.int32)
        codes = jnp.take(codes, order, axis=0)
        arrays["order"] = order
    arrays["codes"] = grouped.pack(codes, scheme.bits)
    if found.zeros is not None:
        arrays["zeros"] = found.zeros
    squares = [
        jnp.sum(jax.reshard(each, P(None)))
        for each in (found.squared_errors, found.squared_outputs)
    ]
    return Rounded(leaf_of(arrays, scheme), found.relative_error, jnp.stack(squares), found.damping)


def _columns(outputs: int, mesh: sharding.MeshOrSizes) -> sharding.Entry:
    """Return the mesh axes over which outputs are divided: as many as divide them."""
    sizes, parts = sharding.axis_sizes(mesh), 1
    axes: list[str] = []
    for axis, size in sizes.items():
        if size > 1 and outputs % (parts * size) == 0:
            axes.append(axis)
            parts *= size
    return sharding.joined(tuple(axes))
