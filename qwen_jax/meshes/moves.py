"""Moves arrays between the host and a mesh; gathers, scatters and exchanges them over the mesh.

Functions take and return global arrays, except those that say that they run within `shard_map`.
Workarounds for XLA's handling of such moves are here too.
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree, Shaped

from qwen_jax.meshes.sharding import (
    BATCH,
    CONTEXT,
    TENSOR,
    Entry,
    axis_sizes,
    entries,
    held_heads,
    joined,
    named,
    spec,
)


def place(
    value: Shaped[np.ndarray, "..."], letters: str, *, lengths: Mapping[str, int] | None = None
) -> Shaped[Array, "..."]:
    """Put a host array on the mesh in force, partitioned by its axis letters, such as "BT".

    lengths: the lengths of axes by letter, where known, as in `sharding.spec`.

    All processes must call this with the same array.
    """
    sharding = named(letters, jax.sharding.get_mesh(), lengths=lengths)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """Copy a whole global array to the host of every process. All processes must call this."""
    return np.asarray(begin_fetch(x))


def begin_fetch(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Start copying a whole global array to the host of every process, without waiting.

    Returns an array on this process's devices; `np.asarray` waits for its copy on the host. All
    processes must call this.
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
    """Make, once for each mesh, a jitted function that copies an array to every device of it."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def handed_over(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Return an array with the same buffers for callers that have entered no mesh.

    The result's mesh has axes that are not explicit, so any jax function takes it outside a mesh.
    While a mesh is entered, x is returned unchanged.
    """
    if not jax.sharding.get_mesh().empty:
        return x
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    free = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(free, sharding.spec))


def sequence_parallel(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Split the tokens of the residual stream x [B, T, D] over `tp` too."""
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    return jax.reshard(x, P(rows, _with(tokens, TENSOR), *rest))


def to_columns(x: Float[Array, "B T D"], split: bool = True) -> Float[Array, "B T D"]:
    """Gather the tokens of an activation x [B, T, D] over `tp`, for column-parallel products.

    The gradients of all products that use the result are summed over `tp` once, together.

    split: whether the weights of these products are split over `tp`. Where each device has the
        whole weights (key/value heads fewer than `tp`), it has the whole gradient too, and nothing
        is summed.
    """
    if axis_sizes()[TENSOR] == 1:
        return x
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    kept = joined(tuple(axis for axis in entries(tokens) if axis != TENSOR))
    return jax.reshard(x, P(rows, kept, *rest, reduced=frozenset([TENSOR] if split else [])))


def to_heads(
    x: Float[Array, "B T D"], kv_heads: int
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Gather the tokens of x [B, T, D] over `tp`, for the products that make queries and keys.

    Returns x for the queries, and x for the keys and values. They differ where `tp` does not divide
    the key/value heads: then each device has all key/value weights.
    """
    columns = to_columns(x)
    return columns, columns if held_heads(kv_heads) == kv_heads else to_columns(x, split=False)


def split_heads(x: Float[Array, "B T _"], head_dim: int) -> Float[Array, "B T N H"]:
    """Split the last axis into heads: [B, T, N H] -> [B, T, N, H]."""
    spec = jax.typeof(x).sharding.spec
    return jnp.reshape(x, (*x.shape[:2], -1, head_dim), out_sharding=P(*spec, None))


def merge_heads(x: Float[Array, "B T N H"]) -> Float[Array, "B T _"]:
    """Merge the last two axes, heads and their elements: [B, T, N, H] -> [B, T, N H]."""
    spec = jax.typeof(x).sharding.spec
    return jnp.reshape(x, (*x.shape[:2], -1), out_sharding=P(*spec[:3]))


def spread_heads(x: Float[Array, "B T K H"]) -> Float[Array, "B T held H"]:
    """Repeat the heads of keys or values x [B, T, K, H] so that `tp` divides them, and split them.

    Returns [B, T, heads, H], or x itself if `tp` divides K.
    """
    batch, length, heads, dim = x.shape
    held = held_heads(heads)
    if held == heads:
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, held // heads, dim))
    return jax.reshard(x.reshape(batch, length, held, dim), spec("BTKH"))


def spread(
    x: Shaped[Array, "..."] | Shaped[np.ndarray, "..."], letters: str
) -> Shaped[Array, "..."]:
    """Partition a whole array by its axis letters, within a program that the host gave it to."""
    return jax.reshard(jnp.asarray(x), spec(letters))


def part_of_batch() -> Int[Array, ""]:
    """Return the number of this device's part of the batch, int32 []. Runs within `shard_map`."""
    sizes = axis_sizes()
    axes = tuple(axis for axis in BATCH if sizes[axis] > 1)
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def own_rows(x: Shaped[Array, "b ..."]) -> Shaped[Array, "share ..."]:
    """Take this device's share of the sequences of a batch that all devices of `tp` hold.

    x: [b, ...], an entry for each sequence, padded with zeros to a multiple of `tp`. Runs within
        `shard_map`.
    """
    parts = axis_sizes()[TENSOR]
    if parts == 1:
        return x
    x = _filled_up(x, parts)
    share = x.shape[0] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * share, share)


def whole_rows(x: Shaped[Array, "b columns"]) -> Shaped[Array, "share V"]:
    """Exchange over `tp` some columns of all sequences for all columns of some sequences.

    x: [b, columns], this device's columns (of the vocabulary V) for b sequences, padded with zeros
        to a multiple of `tp`.

    Returns [b / tp, V]. Runs within `shard_map`.
    """
    parts = axis_sizes()[TENSOR]
    if parts == 1:
        return x
    return jax.lax.all_to_all(_filled_up(x, parts), TENSOR, 0, 1, tiled=True)


def all_rows(x: Shaped[Array, "share ..."], rows: int) -> Shaped[Array, "{rows} ..."]:
    """Gather over `tp` the `rows` sequences of a batch that `own_rows` has divided.

    x: [share, ...], this device's share. Returns [rows, ...]. Runs within `shard_map`.
    """
    if axis_sizes()[TENSOR] == 1:
        return x
    return jax.lax.all_gather(x, TENSOR, axis=0, tiled=True)[:rows]


def _filled_up(x: jax.Array, parts: int) -> jax.Array:
    """Append zeros to x along its first axis, until `parts` divides the axis."""
    return jnp.pad(x, ((0, -x.shape[0] % parts), *[(0, 0)] * (x.ndim - 1)))


def _with(entry: Entry, axis: str) -> Entry:
    """Add a mesh axis to an entry of a PartitionSpec, unless the axis has size 1."""
    return joined((*entries(entry), *((axis,) if axis_sizes()[axis] > 1 else ())))


def zigzag(x: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Reorder tokens [B, T] from sequence order to the order that balances ring attention."""
    if axis_sizes()[CONTEXT] == 1:
        return x
    order = zigzag_order(x.shape[1])
    rows = jax.typeof(x).sharding.spec[0]
    return jax.reshard(jax.reshard(x, P(rows, None))[:, order], spec("BT"))


def zigzag_order(length: int) -> Int[np.ndarray, " {length}"]:
    """Return the order of tokens that balances ring attention: their sequence positions, int32 [T].

    A sequence is cut into two pieces for each device of `context`, and device i of n holds pieces i
    and 2n - 1 - i. Raises ValueError if T = `length` does not divide into such pieces.
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
def settled(x: PyTree) -> PyTree:
    """Return a tree x unchanged; the backward pass computes all its gradients before using any.

    XLA otherwise defers the products that make weight gradients, and keeps their operands until the
    other half of the block is done: 1 GB of 11 GB per device (72B, fsdp 64 x tp 8, v5p).
    """
    return x


def _settle(given: PyTree) -> tuple[PyTree, list[tuple[()] | None]]:
    """Return the tree, and a mark for each leaf that has a gradient: the forward pass of `settled`.

    The mark is () with a gradient and None without: saved values must be arrays, or hold none.
    """
    leaves, tree = jax.tree.flatten(given)
    return tree.unflatten([x.value for x in leaves]), [() if x.perturbed else None for x in leaves]


def _settle_gradients(wanted: list[tuple[()] | None], dx: PyTree) -> tuple[PyTree]:
    """Run the backward pass of `settled`: compute all gradients that exist before any is used.

    wanted: the marks of the leaves, from `_settle`. No gradient is computed for a frozen weight.
    """
    leaves, tree = jax.tree.flatten(dx)
    zero = jax.custom_derivatives.SymbolicZero
    there = [mark == () and not isinstance(x, zero) for mark, x in zip(wanted, leaves, strict=True)]
    settled = iter(jax.lax.optimization_barrier(list(itertools.compress(leaves, there))))
    return (tree.unflatten([next(settled) if t else None for t in there]),)


settled.defvjp(_settle, _settle_gradients, symbolic_zeros=True)
