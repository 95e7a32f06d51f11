"""Parses, formats, makes and chooses meshes of devices, and checks that a model divides over them.

`sharding.py` says what each mesh axis splits. Nothing here knows of modules or files: a model is
given as the lengths of its array axes by letter, such as `{"D": 4096, "N": 32}`.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qwen_jax.meshes.sharding import (
    AXES,
    BATCH,
    CONTEXT,
    COPIES,
    TENSOR,
    WEIGHTS,
    MeshOrSizes,
    axis_sizes,
)
from qwen_jax.runtime.texts import described

_MOST_TRIED = 2**13  # the most devices of a suggested mesh


def parse(text: str | None) -> dict[str, int]:
    """Parse a mesh such as `"fsdp=4,tp=2"` into the size of each mesh axis.

    Axes that the text does not name have size 1. None and "" name no axis.

    Raises ValueError, which shows the accepted form, for an unknown or repeated axis and for a size
    that is not a whole number of at least 1.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    named = [item.partition("=")[0].strip() for item in (text or "").split(",")]
    for item in filter(None, (text or "").split(",")):
        name, size = (part.strip() for part in item.partition("=")[::2])
        wrong = name not in AXES or named.count(name) > 1
        if wrong or not size.isdecimal() or len(size) > 9 or int(size) < 1:
            raise ValueError(f"mesh {text!r}: write it as fsdp=4,tp=2 (axes: {', '.join(AXES)})")
        sizes[name] = int(size)
    return sizes


def describe(sizes: Mapping[str, int]) -> str:
    """Format the sizes of mesh axes as text that `parse` reads, such as `fsdp=4,tp=2`.

    Axes of size 1 are left out. A mesh of one device is `fsdp=1`.
    """
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "fsdp=1"


def make(sizes: Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """Make a mesh with explicit axes over the first devices.

    sizes: the size of each mesh axis by name; axes that are not named have size 1, and None names
        no axis.
    devices: None takes all devices of this run, over all processes. Over several TPU slices, `data`
        spans the slices.

    Raises ValueError for invalid sizes, for a mesh that needs more devices than there are, and for
    one in which another axis than `data` would span slices.
    """
    _check_sizes({} if sizes is None else sizes)
    shape = tuple((sizes or {}).get(axis, 1) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"mesh {describe(sizes or {})} needs {math.prod(shape)} devices, "
            f"there are {len(devices)}"
        )
    by_slice = _slices(devices[: math.prod(shape)])
    within = (shape[0] // len(by_slice), *shape[1:])
    if any(len(part) != math.prod(within) for part in by_slice):
        raise ValueError(
            f"mesh {describe(sizes or {})}: {COPIES} must be a multiple of the {len(by_slice)} "
            "slices that it goes over"
        )
    parts = [
        mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=True)
        for part in by_slice
    ]
    explicit = (AxisType.Explicit,) * len(AXES)
    return in_planes(Mesh(np.concatenate(parts), AXES, axis_types=explicit))


def _check_sizes(sizes: Any) -> None:
    """Raise ValueError unless `sizes` maps names of mesh axes to whole numbers of at least 1."""
    allowed = f"sizes of at least 1 by axis, such as {{'fsdp': 4}} (axes: {', '.join(AXES)})"
    if not isinstance(sizes, Mapping):
        raise ValueError(f"mesh must be {allowed}, got {described(sizes)}")
    for axis, size in sizes.items():
        whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if axis not in AXES or not whole or size < 1:
            raise ValueError(f"mesh: {axis!r}: {described(size)}: must be {allowed}")


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """Group devices by TPU slice. Devices other than TPUs form one group, whatever their hosts."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        found.setdefault(index, []).append(device)
    return list(found.values())


def count_slices(devices: Sequence[Any]) -> int:
    """Return the number of TPU slices to which `devices` belong, 1 if they are not TPUs."""
    return len(_slices(devices))


def in_planes(mesh: Mesh) -> Mesh:
    """Split the mesh axis `fsdp` into `fsdp_outer` and `fsdp` if XLA then gathers weights faster.

    That is so where `fsdp` spans three dimensions of a TPU torus: each part then lies in one plane
    of the torus. Any other mesh is returned unchanged.
    """
    outer = _planes(mesh)
    if outer == 1:
        return mesh
    split = {**mesh.shape, "fsdp_outer": outer, "fsdp": mesh.shape["fsdp"] // outer}
    devices = mesh.devices.reshape(tuple(split.values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _planes(mesh: Mesh) -> int:
    """Return into how many equal parts `fsdp` is split so that each lies in a plane of a 3-D torus.

    1 means that `fsdp` stays whole. XLA gathers an array over one or two dimensions of a torus
    directly; over three it adds up arrays of zeros, which sends twice the bytes and holds two
    copies of the result.
    """
    line = np.moveaxis(mesh.devices, AXES.index("fsdp"), -1).reshape(-1, mesh.shape["fsdp"])[0]
    if mesh.shape["fsdp_outer"] > 1 or not hasattr(line[0], "coords"):
        return 1
    places = np.array([device.coords for device in line])
    moving = [axis for axis in range(places.shape[1]) if len(set(places[:, axis])) > 1]
    if len(moving) < 3:
        return 1
    outer = min(moving, key=lambda axis: int(np.sum(np.diff(places[:, axis]) != 0)))
    planes = places[:, outer].reshape(len(set(places[:, outer])), -1)
    return len(planes) if np.all(planes == planes[:, :1]) else 1


def current() -> Mesh:
    """Return the mesh entered with `jax.set_mesh`, or a mesh of one device if none is entered.

    Raises ValueError if the entered mesh has axes other than `AXES`, or axes that are not explicit.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return make()
    if not set(mesh.axis_names) <= set(AXES) or set(mesh.axis_types) != {AxisType.Explicit}:
        raise ValueError(
            f"the mesh in force is {mesh}: it needs explicit axes out of {', '.join(AXES)}"
        )
    return mesh


@contextlib.contextmanager
def entered(mesh: Mesh) -> Iterator[Mesh]:
    """Enter `mesh` for a `with` statement, whatever mesh was in force before, and yield it."""
    with jax.set_mesh(mesh):
        yield mesh


def check(
    lengths: Mapping[str, int], mesh: MeshOrSizes, *, sequence_parallel: bool = False
) -> None:
    """Raise ValueError, with the nearest mesh that works, if a model does not divide over `mesh`.

    lengths: the lengths of array axes by letter: V, D, N, K, F and, where known, B (sequences of a
        batch) and T (tokens of a sequence).
    mesh: a mesh, or the sizes of its axes by name.
    sequence_parallel: whether the tokens T are split over `tp` too.
    """
    sizes = axis_sizes(mesh)
    problem = _problem(lengths, sizes, sequence_parallel=sequence_parallel)
    if problem is None:
        return
    nearest = _nearest(lengths, sizes, sequence_parallel=sequence_parallel)
    advice = f"; the nearest mesh that works is {describe(nearest)}" if nearest else ""
    raise ValueError(f"mesh {describe(sizes)}: {problem}{advice}")


def splits_tokens(
    asked: bool | None, length: int, *, mesh: MeshOrSizes | None = None
) -> tuple[bool, str]:
    """Decide whether training splits the residual stream by tokens over `tp`.

    Each device of `tp` then stores a part of the residual stream instead of the whole, at the cost
    of somewhat more traffic (docs/scaling.md). By default it is split wherever the tokens divide.

    asked: the user's choice, or None for the default.
    length: the number of tokens T of a sequence.
    mesh: a mesh, or the sizes of its axes by name; None is the mesh in force.

    Returns the decision, and the reason for it in words.
    """
    sizes = axis_sizes(mesh)
    if asked is not None:
        return asked, "as asked for"
    if sizes[TENSOR] == 1:
        return False, "the mesh has no tp"
    if problem := _problem({"T": length}, sizes, sequence_parallel=True):
        return False, problem
    over = " x ".join(f"{axis}={sizes[axis]}" for axis in (CONTEXT, TENSOR) if sizes[axis] > 1)
    return True, f"the default where tokens divide, as {length} do over {over}"


_NAMES = {
    "V": "vocabulary",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "F": "feed-forward width",
    "B": "batch",
    "T": "length",
}


def _problem(
    lengths: Mapping[str, int], sizes: Mapping[str, int], *, sequence_parallel: bool = False
) -> str | None:
    """Describe, for an error message, the first array axis that does not divide over a mesh.

    lengths: the lengths of array axes by letter.
    sizes: the sizes of all mesh axes by name.
    sequence_parallel: whether the tokens T are split over `tp` too.

    Returns None if all array axes divide.
    """
    tokens = (CONTEXT, TENSOR) if sequence_parallel else (CONTEXT,)
    over = {"B": BATCH, "D": WEIGHTS, "T": tokens} | dict.fromkeys("NFVK", (TENSOR,))
    for letter, axes in over.items():
        parts = math.prod(sizes[axis] for axis in axes)
        length = lengths.get(letter)
        pieces = letter == "T" and sizes[CONTEXT] > 1
        if pieces:  # each device holds a piece from the front and one from the back (`zigzag`)
            parts = math.lcm(parts, 2 * sizes[CONTEXT])
        if length is None or length % parts == 0:
            continue
        if letter == "K" and parts % length == 0:
            continue  # fewer heads than devices: each is held by several
        named = " x ".join(f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        twice = " (in two pieces each)" if pieces else ""
        return f"{_NAMES[letter]} {letter} = {length} is not divisible by {named}{twice}"
    return None


def _nearest(
    lengths: Mapping[str, int], sizes: Mapping[str, int], *, sequence_parallel: bool
) -> dict[str, int] | None:
    """Return the mesh nearest to `sizes` over which a model divides, or None if there is none.

    lengths: the lengths of array axes by letter.
    sizes: the sizes of all mesh axes by name.
    sequence_parallel: whether the tokens T are split over `tp` too.

    The nearest mesh has as many devices, or else the largest smaller number, and sizes changed as
    little as possible. Of several, it is the one that moves devices into `fsdp`, which every
    program can use.
    """

    def changed(mesh: dict[str, int]) -> tuple[float, ...]:
        moved = sum(abs(math.log2(mesh[axis] / sizes[axis])) for axis in AXES)
        return moved, mesh[CONTEXT], mesh["fsdp_outer"], mesh[COPIES]

    for total in range(min(math.prod(sizes.values()), _MOST_TRIED), 0, -1):
        if fitting := list(of_size(total, lengths, sequence_parallel=sequence_parallel)):
            return min(fitting, key=changed)
    return None


def of_size(
    total: int, lengths: Mapping[str, int] | None = None, *, sequence_parallel: bool = False
) -> Iterator[dict[str, int]]:
    """Yield the axis sizes of every mesh of `total` devices over which a model divides.

    lengths: the lengths of the model's array axes by letter; None yields every mesh.
    sequence_parallel: whether the tokens T are split over `tp` too.
    """
    lengths = lengths or {}
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    divisors = sorted({*small, *(total // n for n in small)})

    def divides(mesh: Mapping[str, int]) -> bool:
        return _problem(lengths, axis_sizes(mesh), sequence_parallel=sequence_parallel) is None

    *some, last = ([n for n in divisors if divides({axis: n})] for axis in AXES)
    for sizes in itertools.product(*some):
        rest, left = divmod(total, math.prod(sizes))
        mesh: dict[str, int] = dict(zip(AXES, (*sizes, rest), strict=True))
        if left == 0 and rest in last and divides(mesh):
            yield mesh


def default(
    lengths: Mapping[str, int], devices: int, *, training: bool = False, slices: int = 1
) -> dict[str, int]:
    """Choose the axis sizes of a mesh of the most devices over which a model divides.

    lengths: the lengths of the model's array axes by letter.
    devices: the number of devices of all slices together.
    training: whether the mesh is for training; otherwise it is for decoding.
    slices: the number of TPU slices. The mesh spans all of them or lies in one.

    Decoding reads every weight for each token, so `tp` takes as many devices as it can, and the
    others split the batch. Training splits the batch and the weights over `fsdp`; `data` takes only
    devices over which the model width does not divide, and the slices; `tp` takes only devices over
    which the batch does not divide.
    """
    least = (TENSOR, CONTEXT, COPIES) if training else (COPIES, CONTEXT, "fsdp")
    for total in [devices] * (slices > 1) + list(range(devices // slices, 0, -1)):
        over = slices if total > devices // slices else 1
        fitting = [m for m in of_size(total, lengths) if m[COPIES] % over == 0]
        fitting = [m for m in fitting if m[CONTEXT] == m["fsdp_outer"] == 1]
        if fitting:
            return min(fitting, key=lambda m: tuple(m[axis] for axis in least))
    raise AssertionError("one device holds everything")
