"""How a model directory stores the kinds of leaves: a quantised weight is several arrays.

A plain weight is one array at its path, such as `layers.0.attn.q`; a quantised one has an array for
each field of its type, such as `layers.0.attn.q.codes`. The manifest's `kinds` names the kind of
each quantised weight. This module imports no jax until leaves are made.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax.checkpoint import store
from qwen_jax.checkpoint.directory import CONFIG, MANIFEST, CheckpointError, mismatch

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

    from qwen_jax.leaves.grouped import Grouped
    from qwen_jax.leaves.int8 import Int8
    from qwen_jax.leaves.weights import Leaf, Weight
    from qwen_jax.meshes.sharding import MeshOrSizes

KINDS = "kinds"  # manifest key: the kind of each quantised weight, by path
INT8 = "int8"  # `leaves.int8.Int8`, with one scale for an output
GROUPED = {"grouped4": 4, "grouped8": 8}  # `leaves.grouped.Grouped`, and the bits of its codes
# The fields of each kind; all weights of it have the first two.
_FIELDS = {INT8: ("values", "scale")} | dict.fromkeys(
    GROUPED, ("codes", "scales", "zeros", "order")
)
_WORD = 32  # the bits of a word of codes

Shapes = Mapping[str, tuple[int, ...]]


def of_leaf(leaf: "Leaf") -> str | None:
    """Return the kind under which a directory stores a leaf of several arrays; None for none."""
    from qwen_jax.leaves.grouped import Grouped
    from qwen_jax.leaves.int8 import Int8

    if isinstance(leaf, Grouped):
        return f"grouped{leaf.bits}"
    return INT8 if isinstance(leaf, Int8) and leaf.zero is None else None


def arrays(path: str, leaf: "Leaf") -> "dict[str, Weight]":
    """Return the arrays of a quantised weight by the paths at which a directory stores them."""
    kind = of_leaf(leaf)
    assert kind is not None, f"{path} is of no kind that is stored"
    fields = {f"{path}.{field}": getattr(leaf, field) for field in _FIELDS[kind]}
    return {name: array for name, array in fields.items() if array is not None}


def of_manifest(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each quantised weight of a directory, by path; {} where all are plain.

    Raises CheckpointError for a kind that this version does not know.
    """
    kinds = manifest.get(KINDS, {})
    if not isinstance(kinds, dict):
        raise CheckpointError(f"{MANIFEST} is damaged: its {KINDS} is no object; convert again")
    for path, kind in kinds.items():
        if kind not in [*_FIELDS]:
            raise CheckpointError(
                f"{MANIFEST} says that {path} is of kind {kind!r}, this version of qwen_jax knows "
                f"{', '.join(_FIELDS)}: update qwen_jax or convert again"
            )
    return kinds


def shapes(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a directory, outputs first, by path.

    That of a quantised weight is computed from its arrays. Raises CheckpointError if these do not
    fit one another.
    """
    found = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    for path, kind in of_manifest(manifest).items():
        parts = fields_of(path, manifest)
        for field in parts:
            del found[f"{path}.{field}"]
        lacking = [field for field in _FIELDS[kind][:2] if field not in parts]
        try:
            if lacking:
                raise ValueError(f"no {' and no '.join(lacking)}")
            found[path] = _int8(**parts) if kind == INT8 else _grouped(GROUPED[kind], **parts)
        except ValueError as error:
            raise CheckpointError(
                f"{MANIFEST} is damaged: {path}, of kind {kind}, has {error}; convert again"
            ) from None
    return found


def fields_of(path: str, manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a quantised weight's arrays in a directory, by field."""
    names = {field: f"{path}.{field}" for field in _FIELDS[manifest[KINDS][path]]}
    stored = manifest["shapes"]
    return {field: tuple(stored[name]) for field, name in names.items() if name in stored}


def check_shapes(root: Path, manifest: Mapping[str, Any], *, wanted: Shapes) -> None:
    """Raise CheckpointError if the stored weights differ from those that config.json implies.

    root: the directory, for the message.
    manifest: the directory's manifest, which has the stored shapes.
    wanted: the shape of each weight that config.json implies, by its path.
    """
    if problems := mismatch(shapes(manifest), wanted):
        raise CheckpointError(
            f"the weights in {root} do not match {CONFIG}: {problems}; put back the {CONFIG} that "
            "they were converted with, or convert again"
        )


def _int8(values: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an int8 weight from those of its arrays; ValueError if they disagree."""
    if len(values) != 2 or values[:-1] != scale:
        raise ValueError(f"values {list(values)} and scale {list(scale)}")
    return values


def _grouped(
    bits: int,
    codes: tuple[int, ...],
    scales: tuple[int, ...],
    zeros: tuple[int, ...] | None = None,
    order: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """Return the shape of a grouped weight, [out, in], from those of its arrays.

    Raises ValueError if they disagree.
    """
    if len(codes) != 2 or len(scales) != 2:
        raise ValueError(f"codes {list(codes)} and scales {list(scales)}")
    (rows, outputs), (groups, also) = codes, scales
    inputs = rows * _WORD // bits
    if outputs != also or groups < 1 or inputs % groups:
        raise ValueError(f"codes {list(codes)} and scales {list(scales)}")
    if zeros not in (None, scales) or order not in (None, (inputs,)):
        raise ValueError(f"codes {list(codes)}, zeros {zeros} and order {order}")
    return outputs, inputs


@dataclasses.dataclass(frozen=True)
class Field:
    """An array of a quantised weight in memory.

    letters: its axis letters. "I" is no axis of a model, and no mesh axis divides it.
    shape, dtype: its shape and the name of its dtype.
    repeat: how often each stored row follows itself.
    """

    letters: str
    shape: tuple[int, ...]
    dtype: str
    repeat: int = 1


Fields = Mapping[str, Field]


def layout(
    kind: str,
    like: "Weight",
    *,
    stored: Shapes,
    mesh: "MeshOrSizes",
    sizes: Mapping[str, int],
) -> Fields:
    """Return the arrays of a quantised weight on a mesh, by field.

    kind: a kind of leaf.
    like: the plain weight [out, in] in whose place it stands, as a shape.
    stored: the shapes of its arrays in a directory, by field.
    sizes: the lengths of array axes by letter.

    Groups that the mesh would cut are made smaller, with their scales repeated, which changes no
    weight. Raises ValueError where the mesh cuts a word of codes.
    """
    from qwen_jax import meshes
    from qwen_jax.leaves.grouped import group_for
    from qwen_jax.meshes import sharding

    if kind == INT8:
        return {
            "values": Field(like.letters, stored["values"], "int8"),
            "scale": Field(like.letters[:-1], stored["scale"], "bfloat16"),
        }
    inward = like.letters[::-1]
    axes = sharding.entries(sharding.spec(inward, sizes, mesh=mesh)[0])
    parts = math.prod(sharding.axis_sizes(mesh)[axis] for axis in axes)
    inputs, (groups, outputs) = like.shape[1], stored["scales"]
    try:
        size = group_for(inputs, group_size=inputs // groups, parts=parts, bits=GROUPED[kind])
    except ValueError as error:
        named = meshes.describe(sharding.axis_sizes(mesh))
        raise ValueError(f"mesh {named}: {error}: choose a mesh with a smaller axis") from None
    grid, repeat = (inputs // size, outputs), inputs // size // groups
    found = {
        "codes": Field(inward, stored["codes"], "uint32"),
        "scales": Field(inward, grid, "float16", repeat),
        "zeros": Field(inward, grid, "uint8", repeat),
        "order": Field("I", (inputs,), "int32"),
    }
    return {field: array for field, array in found.items() if field in stored}


def made(kind: str, arrays: "Mapping[str, Weight]") -> "Grouped | Int8[Weight]":
    """Return the quantised weight that has these arrays, by field."""
    from qwen_jax.leaves.grouped import Grouped
    from qwen_jax.leaves.int8 import Int8

    if kind == INT8:
        return Int8(arrays["values"], arrays["scale"])
    zeros, order = arrays.get("zeros"), arrays.get("order")
    return Grouped(arrays["codes"], arrays["scales"], zeros, order, GROUPED[kind])


def restore(
    params: Path,
    path: str,
    *,
    kind: str,
    fields: Fields,
    mesh: "Mesh",
    sizes: Mapping[str, int],
) -> "Grouped | Int8[Weight]":
    """Restore a quantised weight, each process its own shards.

    params: the params/ folder of the directory. kind, mesh, sizes: those of `layout`, whose result
    `fields` is.
    """
    import numpy as np

    from qwen_jax.leaves.weights import Weight
    from qwen_jax.meshes import sharding

    arrays = {
        name: store.restore(
            params,
            f"{path}.{name}",
            shape=field.shape,
            dtype=np.dtype(field.dtype),
            place=sharding.named(field.letters, mesh, lengths=sizes),
            repeat=field.repeat,
        )
        for name, field in fields.items()
    }
    return made(kind, {name: Weight(x, letters=fields[name].letters) for name, x in arrays.items()})


def abstract(
    kind: str,
    like: "Weight",
    *,
    stored: Shapes,
    mesh: "Mesh | AbstractMesh",
    sizes: Mapping[str, int],
) -> "Grouped | Int8[Weight]":
    """Return a quantised weight as shapes with partitionings; the arguments are `layout`'s."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from qwen_jax.leaves.weights import Weight
    from qwen_jax.meshes import sharding

    def one(field: Field) -> Weight:
        shape = jax.ShapeDtypeStruct(
            field.shape,
            np.dtype(field.dtype),
            sharding=NamedSharding(mesh, sharding.spec(field.letters, sizes, mesh=mesh)),
        )
        return Weight(shape, letters=field.letters)

    fields = layout(kind, like, stored=stored, mesh=mesh, sizes=sizes)
    return made(kind, {name: one(field) for name, field in fields.items()})
