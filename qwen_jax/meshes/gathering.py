"""Gathers a layer's weights over the FSDP axes before their use, and scatters their gradients."""

import functools
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from qwen_jax.meshes.sharding import COPIES, WEIGHTS, axis_sizes, entries, joined

_Tree = TypeVar("_Tree")
_LANES = 128  # the lanes of a TPU register


def unshard(tree: _Tree, dtype: DTypeLike | None = None) -> _Tree:
    """Gather the weights of a tree over the FSDP axes just before their use, rounded to `dtype`.

    tree: a module, or any tree of weights.
    dtype: the floating-point dtype of the values that are gathered; None keeps each weight's dtype.
        Integers always keep theirs, and so do floats of as many bytes, such as float16 scales in a
        pass in bfloat16.

    A weight of a wider dtype is returned in that dtype, although its values are rounded and travel
    as `dtype`, so its gradient is summed over the mesh and scattered in the weight's own dtype.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        rounded = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        if not rounded or jnp.dtype(dtype).itemsize == leaf.dtype.itemsize:
            axis, places = _gathering(spec)
            return _resharded(leaf, axis, places=places)
        return _gathered(leaf, jnp.dtype(dtype), leaf.dtype, spec)

    return jax.tree.map(gather, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(leaf: jax.Array, dtype: DTypeLike, own: DTypeLike, spec: P) -> jax.Array:
    """Gather one weight over the FSDP axes, rounded to `dtype`.

    own, spec: the weight's dtype and partitioning. The result has the wider of the two dtypes.
    """
    axis, places = _gathering(spec)
    whole = _resharded(leaf.astype(dtype), axis, places=places)
    return whole.astype(jnp.promote_types(dtype, own))


def _gathered_forward(
    leaf: jax.Array, dtype: DTypeLike, own: DTypeLike, spec: P
) -> tuple[jax.Array, None]:
    """Compute `_gathered`, whose gradients need nothing but its arguments."""
    return _gathered(leaf, dtype, own, spec), None


def _scatter(
    dtype: DTypeLike, own: DTypeLike, spec: P, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    """Run the backward pass of `_gathered`: reduce-scatter by mesh axis, then sum over `data`."""
    axis, places = _gathering(spec)
    back = [P(*place.partitions, unreduced=place.reduced) for place in reversed([*places][:-1])]
    return (_resharded(gradient, axis, places=back).astype(own),)


_gathered.defvjp(_gathered_forward, _scatter)


def _resharded(x: jax.Array, axis: int, *, places: Sequence[P]) -> jax.Array:
    """Reshard x to one partitioning after another, with `axis` moved to the front meanwhile.

    places: the partitionings in order, for x with that axis in front.
    """
    x = jnp.moveaxis(x, axis, 0)
    for place in places:
        x = jax.reshard(x, place)
    return jnp.moveaxis(x, 0, axis)


def _gathering(spec: P) -> tuple[int, list[P]]:
    """Plan how a weight is gathered: the array axis to gather, and the partitionings on the way.

    The axis is the one that mesh axes in `WEIGHTS` split. The partitionings lead from the weight's
    own to the gathered one. They are of the weight with that axis in front, where each device's
    part is contiguous. `reduced` in a partitioning means that the gradient is a partial sum, still
    to be summed over those mesh axes.
    """
    partition = [entries(entry) for entry in spec.partitions]
    split = [i for i, axes in enumerate(partition) if set(axes) & set(WEIGHTS)]
    if not split:
        return 0, [spec]
    axis = split[0]
    if len(partition) == 1:
        return axis, [spec, P(None)]
    first, *others = partition.pop(axis), *map(joined, partition)
    places = [P(joined(first), *others)]
    summed: frozenset[str] = frozenset()
    if axis_sizes()[COPIES] > 1:
        summed |= {COPIES}
        places.append(P(joined(first), *others, reduced=summed))
    for name in reversed([name for name in first if name in WEIGHTS]):
        summed |= {name}
        first = tuple(a for a in first if a != name)
        places.append(P(joined(first), *others, reduced=summed))
    return axis, places


def leading_axis(stacked: jax.Array) -> int:
    """Return the axis of weights stacked over layers that is in front of each layer during a scan.

    A TPU pads the last axis to 128 elements, so stacked gradients would take a multiple of their
    bytes where a device's part of that axis is narrower; then the last axis is moved to the front.
    Otherwise it is axis 1, already in front of each layer.
    """
    last = stacked.ndim - 1
    axes = entries(jax.typeof(stacked).sharding.spec.partitions[last])
    parts = math.prod(axis_sizes()[axis] for axis in axes)
    return last if parts > 1 and stacked.shape[last] // parts < _LANES else 1
