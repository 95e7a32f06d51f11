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

import math
from collections.abc import Mapping
from typing import Any

import jax
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
        return joined(tuple(axis for axis in axes if sizes[axis] > 1))

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


def held_heads(heads: int) -> int:
    """How many key/value heads there are once each device of `tp` has those of its queries."""
    return math.lcm(heads, axis_sizes()[TENSOR])


# Rows over every device, for work on whole rows of the vocabulary (sampling): the rows that the
# devices of `tp` share are dealt out among them, filled up with zeros where they do not divide. So
# no device has more than its share, which leaving axes out that do not divide would not hold.


def rows_spec(ndim: int) -> P:
    """The partitioning of an array of `ndim` axes whose rows are split over all devices."""
    sizes = axis_sizes()
    axes = joined(tuple(axis for axis in (*BATCH, TENSOR) if sizes[axis] > 1))
    return P(axes, *[None] * (ndim - 1))


def padded_rows(rows: int) -> int:
    """How many rows an array of `rows_spec` has for a batch of `rows`, filled up with zeros."""
    sizes = axis_sizes()
    shards = math.prod(sizes[axis] for axis in BATCH)
    return shards * -(-rows // (shards * sizes[TENSOR])) * sizes[TENSOR]


def entries(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def joined(axes: tuple[str, ...]) -> Any:
    """The inverse of `entries`."""
    return axes if len(axes) > 1 else axes[0] if axes else None
