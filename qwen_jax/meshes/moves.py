"""Arrays moved over a mesh: from the host and back, gathered before use, spread, exchanged.

Each function takes global arrays and changes their partitioning only, but for those that say
that they run in `shard_map`. Workarounds for what a compiler does with such moves lie here, too.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.meshes.sharding import (
    CONTEXT,
    COPIES,
    TENSOR,
    WEIGHTS,
    axis_sizes,
    entries,
    held_heads,
    joined,
    named,
    spec,
)

_LANES = 128  # of a TPU's registers


def place(value: np.ndarray, letters: str, lengths: Mapping[str, int] | None = None) -> jax.Array:
    """Put a host array on the mesh in force. All processes call this with the same array."""
    sharding = named(letters, jax.sharding.get_mesh(), lengths)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: jax.Array) -> np.ndarray:
    """Copy the whole of a global array to the host of every process; all of them must call this."""
    return np.asarray(begin_fetch(x))


def begin_fetch(x: jax.Array) -> jax.Array:
    """Begin to copy the whole of a global array to the host of every process.

    The result is an array of this process; `np.asarray` of it waits for the copy, this does not.
    All processes must call this.
    """
    if not (x.is_fully_addressable or x.is_fully_replicated):
        mesh = x.sharding.mesh  # type: ignore[attr-defined]
        with jax.set_mesh(mesh):  # as everywhere, so that the program is made once
            x = _replicator(mesh)(x)
    x = x if x.is_fully_addressable else x.addressable_data(0)
    x.copy_to_host_async()
    return x


@functools.cache
def _replicator(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A program that copies an array to every device of a mesh, which need not be in force."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def handed_over(x: jax.Array) -> jax.Array:
    """Make an array one that callers can give to any jax function, with no mesh entered. It has the
    same buffers.
    """
    if not jax.sharding.get_mesh().empty:
        return x
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    free = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(free, sharding.spec))


def unshard(tree: Any, dtype: Any = None) -> Any:
    """Round weights to `dtype` and gather them over the mesh axes that split weights, just before
    their use.

    A leaf of a wider dtype than `dtype` keeps its own as its type, though its values are rounded
    and travel as `dtype`: its gradient comes back, is summed over the mesh, and scattered in the
    leaf's own. dtype: None keeps each leaf's own; whole numbers always do.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        if dtype in (None, leaf.dtype) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return _resharded(leaf, *_gathering(spec))
        return _gathered(leaf, jnp.dtype(dtype), leaf.dtype, spec)

    return jax.tree.map(gather, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(leaf: jax.Array, dtype: Any, own: Any, spec: P) -> jax.Array:
    """Do for one leaf, of dtype `own` and partitioned by `spec`, what `unshard` does."""
    whole = _resharded(leaf.astype(dtype), *_gathering(spec))
    return whole.astype(jnp.promote_types(dtype, own))


def _gathered_forward(leaf: jax.Array, dtype: Any, own: Any, spec: P) -> tuple[jax.Array, None]:
    return _gathered(leaf, dtype, own, spec), None


def _scatter(dtype: Any, own: Any, spec: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Scatter the gradient of a gathered leaf: each step of the gathering is undone by a sum over
    its mesh axis, of which every device keeps its part; the copies of `data` add up what is left.
    """
    axis, places = _gathering(spec)
    back = [P(*place.partitions, unreduced=place.reduced) for place in reversed([*places][:-1])]
    return (_resharded(gradient, axis, back).astype(own),)


_gathered.defvjp(_gathered_forward, _scatter)


def _resharded(x: jax.Array, axis: int, places: Sequence[P]) -> jax.Array:
    """Reshard x to one partitioning after the other, which are those of x with `axis` put first."""
    x = jnp.moveaxis(x, axis, 0)
    for place in places:
        x = jax.reshard(x, place)
    return jnp.moveaxis(x, 0, axis)


def _gathering(spec: P) -> tuple[int, list[P]]:
    """Plan how a weight is gathered: over which of its axes, and by which partitionings.

    The axis is the one that `WEIGHTS` split. The partitionings, from the weight's own to that of
    the gathered weight, are of the weight with that axis first, where parts lie one behind the
    other. `reduced` says of a copy that its gradient is still to be summed over those mesh axes.
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
    """The axis of stacked weights that comes first in each layer while a scan goes over them.

    A TPU pads the last axis to 128 elements, so the gradients that a scan stacks would take a
    multiple of their bytes where a device's part of that axis is narrower: it goes to the front.
    """
    last = stacked.ndim - 1
    axes = entries(jax.typeof(stacked).sharding.spec.partitions[last])
    parts = math.prod(axis_sizes()[axis] for axis in axes)
    return last if parts > 1 and stacked.shape[last] // parts < _LANES else 1


def sequence_parallel(x: jax.Array) -> jax.Array:
    """Split the tokens of an activation [B, T, D] over `tp` too, as a residual may be kept."""
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    return jax.reshard(x, P(rows, _with(tokens, TENSOR), *rest))


def to_columns(x: jax.Array, split: bool = True) -> jax.Array:
    """Gather the tokens of an activation [B, T, D] on each device of `tp`, as column-parallel
    products take it. The gradients of all products with one result are summed over `tp` once.

    split: whether the weights are; where each device has all of them (key/value heads fewer than
    `tp`), each has all of the gradient too, and there is nothing to sum.
    """
    if axis_sizes()[TENSOR] == 1:
        return x
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    kept = joined(tuple(axis for axis in entries(tokens) if axis != TENSOR))
    return jax.reshard(x, P(rows, kept, *rest, reduced=frozenset([TENSOR] if split else [])))


def spread_heads(x: jax.Array) -> jax.Array:
    """Repeat the heads of keys or values [B, T, K, H] that are fewer than `tp`, so that each device
    has one.
    """
    batch, length, heads, dim = x.shape
    held = held_heads(heads)
    if held == heads:
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, held // heads, dim))
    return jax.reshard(x.reshape(batch, length, held, dim), spec("BTKH"))


def own_rows(x: jax.Array) -> jax.Array:
    """Take this device's share of rows [b, ...] that all devices of `tp` have, in `shard_map`."""
    parts = axis_sizes()[TENSOR]
    if parts == 1:
        return x
    x = _filled_up(x, parts)
    share = x.shape[0] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * share, share)


def whole_rows(x: jax.Array) -> jax.Array:
    """Exchange the columns [b, V of this device] of all rows for this device's share of whole rows,
    in `shard_map`.
    """
    parts = axis_sizes()[TENSOR]
    if parts == 1:
        return x
    return jax.lax.all_to_all(_filled_up(x, parts), TENSOR, 0, 1, tiled=True)


def all_rows(x: jax.Array, rows: int) -> jax.Array:
    """Gather `rows` rows that `own_rows` has dealt out, in `shard_map`."""
    if axis_sizes()[TENSOR] == 1:
        return x
    return jax.lax.all_gather(x, TENSOR, axis=0, tiled=True)[:rows]


def _filled_up(x: jax.Array, parts: int) -> jax.Array:
    """Append rows of zeros to x, so that the number of rows is a multiple of `parts`."""
    return jnp.pad(x, ((0, -x.shape[0] % parts), *[(0, 0)] * (x.ndim - 1)))


def _with(entry: Any, axis: str) -> Any:
    return joined((*entries(entry), *((axis,) if axis_sizes()[axis] > 1 else ())))


def zigzag(x: jax.Array) -> jax.Array:
    """[B, T] in the order of a sequence -> the same tokens, in the order of the devices."""
    if axis_sizes()[CONTEXT] == 1:
        return x
    order = zigzag_order(x.shape[1])
    rows = jax.typeof(x).sharding.spec[0]
    return jax.reshard(jax.reshard(x, P(rows, None))[:, order], spec("BT"))


def zigzag_order(length: int) -> np.ndarray:
    """int32 [T]: the place in its sequence of each token, as `zigzag` orders them."""
    devices = axis_sizes()[CONTEXT]
    places = np.arange(length, dtype=np.int32)
    if devices == 1:
        return places
    if length % (2 * devices):
        raise ValueError(f"length T = {length} does not divide into two pieces a device")
    pieces = [piece for i in range(devices) for piece in (i, 2 * devices - 1 - i)]
    return places.reshape(2 * devices, -1)[pieces].reshape(-1)


@jax.custom_vjp
def settled(x: Any) -> Any:
    """x; backward, its gradients are all there before any is used.

    XLA otherwise puts off the products that make the gradients of weights, and keeps their operands
    until the other half of the block is done: 1 GB of 11 a device (72B, fsdp 64 x tp 8, v5p).
    """
    return x


def _settle(given: Any) -> tuple[Any, list[Any]]:
    """Which leaves have gradients is said by the structure, () or None, as it is no array."""
    leaves, tree = jax.tree.flatten(given)
    return tree.unflatten([x.value for x in leaves]), [() if x.perturbed else None for x in leaves]


def _settle_gradients(wanted: list[Any], dx: Any) -> tuple[Any]:
    """Those of weights that are not trained are not waited for, and so not made."""
    leaves, tree = jax.tree.flatten(dx)
    zero = jax.custom_derivatives.SymbolicZero
    there = [mark == () and not isinstance(x, zero) for mark, x in zip(wanted, leaves, strict=True)]
    settled = iter(jax.lax.optimization_barrier(list(itertools.compress(leaves, there))))
    return (tree.unflatten([next(settled) if t else None for t in there]),)


settled.defvjp(_settle, _settle_gradients, symbolic_zeros=True)
