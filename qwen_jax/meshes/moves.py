"""Moves of arrays over a mesh: from and to the host, gathering, scattering and exchanging.

Functions take global arrays and change only their partitioning, except those that run within
`shard_map`, which say so. Workarounds for what compilers do with such moves are here too.
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
from jaxtyping import Array, Float, Shaped

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

_LANES = 128  # the lanes of a TPU register


def place(
    value: np.ndarray, letters: str, *, lengths: Mapping[str, int] | None = None
) -> jax.Array:
    """Put a host array on the mesh in force. All processes must call this with the same array."""
    sharding = named(letters, jax.sharding.get_mesh(), lengths=lengths)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: jax.Array) -> np.ndarray:
    """Copy a whole global array to the host of every process. All processes must call this."""
    return np.asarray(begin_fetch(x))


def begin_fetch(x: jax.Array) -> jax.Array:
    """Start copying a whole global array to the host of every process, without waiting.

    Returns an array of this process, for which `np.asarray` waits. All processes must call this.
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
    """Return a program that copies an array to every device of a mesh, in force or not."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def handed_over(x: jax.Array) -> jax.Array:
    """Return an array with the same buffers that any jax function takes without a mesh."""
    if not jax.sharding.get_mesh().empty:
        return x
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    free = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(free, sharding.spec))


def unshard(tree: Any, dtype: Any = None) -> Any:
    """Round weights to `dtype`, and gather them over the FSDP axes just before their use.

    A leaf of a wider dtype keeps it as its type, although its values are rounded and travel as
    `dtype`, so its gradient is summed over the mesh and scattered in the leaf's own dtype.

    dtype: None keeps each leaf's dtype; integers always keep theirs.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        if dtype in (None, leaf.dtype) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            axis, places = _gathering(spec)
            return _resharded(leaf, axis, places=places)
        return _gathered(leaf, jnp.dtype(dtype), leaf.dtype, spec)

    return jax.tree.map(gather, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(leaf: jax.Array, dtype: Any, own: Any, spec: P) -> jax.Array:
    """Gather one leaf, of dtype `own` and partitioned by `spec`, as `unshard` does."""
    axis, places = _gathering(spec)
    whole = _resharded(leaf.astype(dtype), axis, places=places)
    return whole.astype(jnp.promote_types(dtype, own))


def _gathered_forward(leaf: jax.Array, dtype: Any, own: Any, spec: P) -> tuple[jax.Array, None]:
    return _gathered(leaf, dtype, own, spec), None


def _scatter(dtype: Any, own: Any, spec: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Reduce-scatter a gathered leaf's gradient, a mesh axis at a time, then sum over `data`."""
    axis, places = _gathering(spec)
    back = [P(*place.partitions, unreduced=place.reduced) for place in reversed([*places][:-1])]
    return (_resharded(gradient, axis, places=back).astype(own),)


_gathered.defvjp(_gathered_forward, _scatter)


def _resharded(x: jax.Array, axis: int, *, places: Sequence[P]) -> jax.Array:
    """Reshard x to one partitioning after another, given for x with `axis` in front."""
    x = jnp.moveaxis(x, axis, 0)
    for place in places:
        x = jax.reshard(x, place)
    return jnp.moveaxis(x, 0, axis)


def _gathering(spec: P) -> tuple[int, list[P]]:
    """Plan how a weight is gathered: the axis to gather, and the partitionings on the way.

    The axis is the one that `WEIGHTS` split. The partitionings, from the weight's own to the
    gathered one, are of the weight with that axis in front, where its parts are contiguous.
    `reduced` in a type means that the gradient is a partial sum, still to be summed over those mesh
    axes.
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
    """Return the axis of stacked weights that is moved to the front of each layer during a scan.

    A TPU pads the last axis to 128 elements, so stacked gradients would take a multiple of their
    bytes where a device's part of that axis is narrower; then it is moved to the front.
    """
    last = stacked.ndim - 1
    axes = entries(jax.typeof(stacked).sharding.spec.partitions[last])
    parts = math.prod(axis_sizes()[axis] for axis in axes)
    return last if parts > 1 and stacked.shape[last] // parts < _LANES else 1


def sequence_parallel(x: Float[Array, "B T D"]) -> jax.Array:
    """Split the tokens of an activation [B, T, D] over `tp` too, for the residual stream."""
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    return jax.reshard(x, P(rows, _with(tokens, TENSOR), *rest))


def to_columns(x: Float[Array, "B T D"], split: bool = True) -> jax.Array:
    """Gather the tokens of an activation [B, T, D] over `tp`, for column-parallel products.

    The gradients of all products with one result are summed over `tp` once.

    split: whether the weights are split over `tp`. Where each device has all of them (key/value
        heads fewer than `tp`), it has the whole gradient too, and nothing is summed.
    """
    if axis_sizes()[TENSOR] == 1:
        return x
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    kept = joined(tuple(axis for axis in entries(tokens) if axis != TENSOR))
    return jax.reshard(x, P(rows, kept, *rest, reduced=frozenset([TENSOR] if split else [])))


def to_heads(x: Float[Array, "B T D"], kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """Gather the tokens of x [B, T, D] over `tp`, for the products that make queries and keys.

    Returns x for the queries, and x for the keys and values. They differ where `tp` does not divide
    the key/value heads: then each device has all key/value weights.
    """
    columns = to_columns(x)
    return columns, columns if held_heads(kv_heads) == kv_heads else to_columns(x, split=False)


def split_heads(x: Float[Array, "B T _"], head_dim: int) -> jax.Array:
    """Split the last axis into heads: [B, T, N H] -> [B, T, N, H]."""
    spec = jax.typeof(x).sharding.spec
    return jnp.reshape(x, (*x.shape[:2], -1, head_dim), out_sharding=P(*spec, None))


def merge_heads(x: Float[Array, "B T N H"]) -> jax.Array:
    """Merge the last two axes, heads and their elements: [B, T, N, H] -> [B, T, N H]."""
    spec = jax.typeof(x).sharding.spec
    return jnp.reshape(x, (*x.shape[:2], -1), out_sharding=P(*spec[:3]))


def spread_heads(x: Float[Array, "B T K H"]) -> jax.Array:
    """Repeat the heads of keys or values [B, T, K, H] so that each device of `tp` has one."""
    batch, length, heads, dim = x.shape
    held = held_heads(heads)
    if held == heads:
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, held // heads, dim))
    return jax.reshard(x.reshape(batch, length, held, dim), spec("BTKH"))


def own_rows(x: Shaped[Array, "b ..."]) -> jax.Array:
    """Take this device's share of rows [b, ...] held by all of `tp`. Runs in `shard_map`."""
    parts = axis_sizes()[TENSOR]
    if parts == 1:
        return x
    x = _filled_up(x, parts)
    share = x.shape[0] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * share, share)


def whole_rows(x: Shaped[Array, "b columns"]) -> jax.Array:
    """Exchange columns [b, V of this device] of all rows for a share of whole rows.

    Runs in `shard_map`.
    """
    parts = axis_sizes()[TENSOR]
    if parts == 1:
        return x
    return jax.lax.all_to_all(_filled_up(x, parts), TENSOR, 0, 1, tiled=True)


def all_rows(x: Shaped[Array, "share ..."], rows: int) -> jax.Array:
    """Gather `rows` rows that `own_rows` has divided. Runs in `shard_map`."""
    if axis_sizes()[TENSOR] == 1:
        return x
    return jax.lax.all_gather(x, TENSOR, axis=0, tiled=True)[:rows]


def _filled_up(x: jax.Array, parts: int) -> jax.Array:
    """Append rows of zeros to x, so that the number of rows is a multiple of `parts`."""
    return jnp.pad(x, ((0, -x.shape[0] % parts), *[(0, 0)] * (x.ndim - 1)))


def _with(entry: Any, axis: str) -> Any:
    """Add a mesh axis to an entry of a PartitionSpec, unless its size is 1."""
    return joined((*entries(entry), *((axis,) if axis_sizes()[axis] > 1 else ())))


def zigzag(x: Shaped[Array, "B T"]) -> jax.Array:
    """Reorder tokens [B, T] from sequence order to the order that balances ring attention."""
    if axis_sizes()[CONTEXT] == 1:
        return x
    order = zigzag_order(x.shape[1])
    rows = jax.typeof(x).sharding.spec[0]
    return jax.reshard(jax.reshard(x, P(rows, None))[:, order], spec("BT"))


def zigzag_order(length: int) -> np.ndarray:
    """Return the sequence position of each token in the order of `zigzag`, int32 [T].

    Raises ValueError where T does not divide into two pieces per device.
    """
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
    """Return x unchanged; in the backward pass, compute all its gradients before any is used.

    XLA otherwise defers the products that make weight gradients, and keeps their operands until the
    other half of the block is done: 1 GB of 11 a device (72B, fsdp 64 x tp 8, v5p).
    """
    return x


def _settle(given: Any) -> tuple[Any, list[Any]]:
    """Note which leaves have gradients by structure, () or None, as saved values must be arrays."""
    leaves, tree = jax.tree.flatten(given)
    return tree.unflatten([x.value for x in leaves]), [() if x.perturbed else None for x in leaves]


def _settle_gradients(wanted: list[Any], dx: Any) -> tuple[Any]:
    """Wait for the gradients that exist. Frozen weights have none, and none is computed."""
    leaves, tree = jax.tree.flatten(dx)
    zero = jax.custom_derivatives.SymbolicZero
    there = [mark == () and not isinstance(x, zero) for mark, x in zip(wanted, leaves, strict=True)]
    settled = iter(jax.lax.optimization_barrier(list(itertools.compress(leaves, there))))
    return (tree.unflatten([next(settled) if t else None for t in there]),)


settled.defvjp(_settle, _settle_gradients, symbolic_zeros=True)
