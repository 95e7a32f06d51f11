"""Mesh axes, and how arrays are partitioned over them.

A partitioning is named by the axis letters of an array (listed in `model/decoder.py`):
`spec("BTD")` is an activation, `spec("FD")` a weight. The mesh axes are:

    data         splits the batch between copies of the model; for slices with a slow network
    fsdp         splits the batch of activations, and the model width of weights
    fsdp_outer   splits as fsdp, but is gathered separately; `meshes.make` adds it where faster
    context      splits the tokens of a sequence (ring attention), and weights as fsdp does
    tp           splits heads, feed-forward width and vocabulary

Axes of size 1 appear in no partitioning. Only this folder names mesh axes. Nothing here knows of
modules or files.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_Tree = TypeVar("_Tree")
AXES = ("data", "fsdp_outer", "fsdp", "context", "tp")
BATCH = ("data", "fsdp_outer", "fsdp")  # the axes that split the rows of a batch
# The axes that split weights until just before their use. Weights are gathered from the last axis
# to the first, so that the slower links between hosts, which `fsdp` uses, carry the smaller parts.
WEIGHTS = ("context", "fsdp_outer", "fsdp")
COPIES = "data"  # the devices along this axis hold equal weights
CONTEXT = "context"
TENSOR = "tp"
_TENSOR_PARALLEL = frozenset("NKQUFV")
MeshOrSizes = Mesh | AbstractMesh | Mapping[str, int]
Entry = str | tuple[str, ...] | None  # the mesh axes that split one axis, in a PartitionSpec


def spec(
    letters: str, lengths: Mapping[str, int] | None = None, *, mesh: MeshOrSizes | None = None
) -> P:
    """Return the partitioning of an array from its axis letters, such as "BTD" or "FD".

    The letters are listed in `model/decoder.py`. `tp` splits heads, feed-forward width and
    vocabulary. In an activation, which has the axis B, batch axes split B and `context` T; in a
    weight the FSDP axes split D.

    lengths: the lengths of axes by letter, where known: key/value heads (K, and their width U) stay
        whole if `tp` does not divide K.
    mesh: a mesh, or the sizes of its axes by name; None is the mesh in force.
    """
    sizes = axis_sizes(mesh)
    activation = "B" in letters
    heads = (lengths or {}).get("K", sizes[TENSOR])

    def over(letter: str) -> Entry:
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


def axis_sizes(mesh: MeshOrSizes | None = None) -> dict[str, int]:
    """Return the size of each mesh axis in `AXES`, 1 for an axis that the mesh lacks.

    mesh: a mesh, or the sizes of its axes by name; None is the mesh in force.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    shape: Mapping[str, int] = mesh if isinstance(mesh, Mapping) else mesh.shape
    return {axis: shape.get(axis, 1) for axis in AXES}


def named(letters: str, mesh: Mesh, *, lengths: Mapping[str, int] | None = None) -> NamedSharding:
    """Return the sharding of an array on the devices of `mesh`, from the array's axis letters.

    lengths: the lengths of axes by letter, where known: key/value heads (K and U) stay whole if
        `tp` does not divide K.
    """
    return NamedSharding(mesh, spec(letters, lengths, mesh=mesh))


def on_devices(mesh: Mesh, tree: _Tree) -> _Tree:
    """Give the shapes in a tree shardings on the devices of a mesh, for ahead-of-time compilation.

    The devices may belong to hardware that this machine lacks.

    tree: shapes with partitionings, as from `jax.eval_shape`.
    """

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, P() if x.sharding is None else x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, tree)


def held_heads(heads: int) -> int:
    """Return the number of key/value heads once they are repeated so that `tp` divides them."""
    return math.lcm(heads, axis_sizes()[TENSOR])


# Sampling needs the scores of the whole vocabulary for a sequence, and splits the sequences of a
# batch over every device. Sequences that the devices of `tp` share are divided among them, with
# sequences of zeros appended where they do not divide, so that no device has more than its share.
# Dropping mesh axes that do not divide would break that.


def rows_spec(ndim: int) -> P:
    """Return the partitioning of an array whose first axis is split over `BATCH` and `tp`.

    ndim: the number of the array's axes.
    """
    sizes = axis_sizes()
    axes = joined(tuple(axis for axis in (*BATCH, TENSOR) if sizes[axis] > 1))
    return P(axes, *[None] * (ndim - 1))


def padded_rows(rows: int) -> int:
    """Return the padded length of a batch of `rows` sequences that `rows_spec` splits evenly."""
    sizes = axis_sizes()
    shards = math.prod(sizes[axis] for axis in BATCH)
    return shards * -(-rows // (shards * sizes[TENSOR])) * sizes[TENSOR]


def entries(entry: Entry) -> tuple[str, ...]:
    """Return the mesh axes in one entry of a PartitionSpec, () for None."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def joined(axes: tuple[str, ...]) -> Entry:
    """Make an entry of a PartitionSpec from mesh axes. The inverse of `entries`."""
    return axes if len(axes) > 1 else axes[0] if axes else None
