"""Mesh axes and how arrays are partitioned over them. Only this file and `meshes.py`, which makes
and chooses meshes, name mesh axes.

A partitioning is named by the axis letters of an array (legend in `model.py`): `spec("BTD")` is an
activation, `spec("FD")` a weight.

    data         copies of the model: splits the batch; for slices that a slow network connects
    fsdp         splits the batch of activations, and the model dimension of weights
    fsdp_outer   the same, in a step of its own; `meshes.make` splits it off where it is faster
    context      splits the tokens of a sequence (ring attention), and weights as fsdp does
    tp           splits heads, FFN width and vocabulary

Axes of size 1 appear in no partitioning. Nothing here knows of modules or files.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp_outer", "fsdp", "context", "tp")
BATCH = ("data", "fsdp_outer", "fsdp")  # what splits the rows of a batch
# What splits weights until just before their use. They are gathered from the last to the first, so
# the slower links between hosts, over which `fsdp` goes, carry the smaller parts.
WEIGHTS = ("context", "fsdp_outer", "fsdp")
COPIES = "data"  # whose devices hold equal weights
CONTEXT = "context"
TENSOR = "tp"
_LANES = 128  # of a TPU's registers
_TENSOR_PARALLEL = frozenset("NKQUFV")


def spec(letters: str, lengths: Mapping[str, int] | None = None, mesh: Any = None) -> P:
    """Say how an array is partitioned over a mesh, by its axis letters.

    An array with a batch axis is an activation. lengths: the lengths of axes by letter, where they
    are known: key/value heads fewer than `tp` stay whole. mesh: None is the mesh in force.
    """
    sizes = axis_sizes(mesh)
    activation = "B" in letters
    heads = (lengths or {}).get("K", sizes[TENSOR])

    def over(letter: str) -> Any:
        axes: tuple[str, ...] = ()
        if letter == "B":
            axes = BATCH
        elif letter == "T":
            axes = (CONTEXT,)
        elif letter == "D" and not activation:
            axes = WEIGHTS
        elif letter in _TENSOR_PARALLEL and not (letter in "KU" and heads % sizes[TENSOR]):
            axes = (TENSOR,)
        return _entry(tuple(axis for axis in axes if sizes[axis] > 1))

    return P(*map(over, letters))


def axis_sizes(mesh: Any = None) -> dict[str, int]:
    """The size of each of `AXES` in a mesh, or in sizes by axis; None is the mesh in force. An
    axis that is lacking has size 1.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    shape = getattr(mesh, "shape", mesh)
    return {axis: shape.get(axis, 1) for axis in AXES}


def named(letters: str, mesh: Any, lengths: Mapping[str, int] | None = None) -> NamedSharding:
    """The sharding on real devices of an array with these axes; arguments as `spec`."""
    return NamedSharding(mesh, spec(letters, lengths, mesh))


def on_devices(mesh: Mesh, tree: Any) -> Any:
    """Give shapes that have partitionings, as `jax.eval_shape` returns them, shardings on the
    devices of a mesh, which need not be there.
    """

    def one(x: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, P() if x.sharding is None else x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, tree)


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
    first, *others = partition.pop(axis), *map(_entry, partition)
    places = [P(_entry(first), *others)]
    summed: frozenset[str] = frozenset()
    if axis_sizes()[COPIES] > 1:
        summed |= {COPIES}
        places.append(P(_entry(first), *others, reduced=summed))
    for name in reversed([name for name in first if name in WEIGHTS]):
        summed |= {name}
        first = tuple(a for a in first if a != name)
        places.append(P(_entry(first), *others, reduced=summed))
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
    kept = _entry(tuple(axis for axis in entries(tokens) if axis != TENSOR))
    return jax.reshard(x, P(rows, kept, *rest, reduced=frozenset([TENSOR] if split else [])))


def held_heads(heads: int) -> int:
    """How many key/value heads there are once each device of `tp` has those of its queries."""
    return math.lcm(heads, axis_sizes()[TENSOR])


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


# Rows over every device, for work on whole rows of the vocabulary (sampling): the rows that the
# devices of `tp` share are dealt out among them, filled up with zeros where they do not divide. So
# no device has more than its share, which leaving axes out that do not divide would not hold.


def rows_spec(ndim: int) -> P:
    """The partitioning of an array of `ndim` axes whose rows are split over all devices."""
    sizes = axis_sizes()
    axes = _entry(tuple(axis for axis in (*BATCH, TENSOR) if sizes[axis] > 1))
    return P(axes, *[None] * (ndim - 1))


def padded_rows(rows: int) -> int:
    """How many rows an array of `rows_spec` has for a batch of `rows`, filled up with zeros."""
    sizes = axis_sizes()
    shards = math.prod(sizes[axis] for axis in BATCH)
    return shards * -(-rows // (shards * sizes[TENSOR])) * sizes[TENSOR]


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
    return _entry((*entries(entry), *((axis,) if axis_sizes()[axis] > 1 else ())))


def entries(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _entry(axes: tuple[str, ...]) -> Any:
    """The inverse of `entries`."""
    return axes if len(axes) > 1 else axes[0] if axes else None
