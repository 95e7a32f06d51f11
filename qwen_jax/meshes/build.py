"""Meshes of devices: parsed, formatted, made, checked against a model, and chosen.

`sharding.py` says what each axis splits. Nothing here knows of models or files: a model is given as
the lengths of its axes by letter.
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

from qwen_jax.meshes.sharding import AXES, BATCH, CONTEXT, COPIES, TENSOR, WEIGHTS, axis_sizes
from qwen_jax.runtime.texts import described

_MOST_TRIED = 2**13  # the most devices of a suggested mesh


def parse(text: str | None) -> dict[str, int]:
    """Parse a mesh such as `"fsdp=4,tp=2"` into sizes by axis; axes not named are 1.

    Raises ValueError that says what is allowed.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    named = [item.partition("=")[0].strip() for item in (text or "").split(",")]
    for item in filter(None, (text or "").split(",")):
        name, size = (part.strip() for part in item.partition("=")[::2])
        wrong = name not in AXES or named.count(name) > 1
        if wrong or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: write it as fsdp=4,tp=2 (axes: {', '.join(AXES)})")
        sizes[name] = int(size)
    return sizes


def describe(sizes: Mapping[str, int]) -> str:
    """Format sizes as `parse` reads them, without axes of size 1."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "fsdp=1"


def make(sizes: Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """Make a mesh with explicit axes over the first devices. All axes are 1 by default.

    devices: None takes all devices of this run, over all processes. Over several TPU slices, `data`
        spans the slices.

    Raises ValueError for invalid sizes, for fewer devices than the mesh needs, and where another
    axis than `data` would span slices.
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
    """Raise ValueError unless these are whole numbers above 0 by names of axes."""
    allowed = f"sizes of at least 1 by axis, such as {{'fsdp': 4}} (axes: {', '.join(AXES)})"
    if not isinstance(sizes, Mapping):
        raise ValueError(f"mesh must be {allowed}, got {described(sizes)}")
    for axis, size in sizes.items():
        whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if axis not in AXES or not whole or size < 1:
            raise ValueError(f"mesh: {axis!r}: {described(size)}: must be {allowed}")


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """Group devices by TPU slice. Other devices form one group, as their hosts are no slices."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        found.setdefault(index, []).append(device)
    return list(found.values())


def count_slices(devices: Sequence[Any]) -> int:
    """Return the number of TPU slices that devices belong to; 1 for other devices."""
    return len(_slices(devices))


def in_planes(mesh: Mesh) -> Mesh:
    """Return the mesh with `fsdp_outer` split off `fsdp` where that is faster."""
    outer = _planes(mesh)
    if outer == 1:
        return mesh
    split = {**mesh.shape, "fsdp_outer": outer, "fsdp": mesh.shape["fsdp"] // outer}
    devices = mesh.devices.reshape(tuple(split.values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _planes(mesh: Mesh) -> int:
    """Return the number of equal parts of `fsdp` that each lie in a plane of a 3-D torus, else 1.

    XLA gathers over one or two dimensions of a torus; over three it adds up arrays of zeros, which
    sends twice the bytes and holds two copies of the result.
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
    """Return the mesh entered with `jax.set_mesh`, or a mesh of one device.

    Raises ValueError when the mesh in force has axes other than `AXES`, or axes that are not
    explicit.
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
    """Run with `mesh` in force, whatever was in force before."""
    with jax.set_mesh(mesh):
        yield mesh


def check(lengths: Mapping[str, int], mesh: Any, *, sequence_parallel: bool = False) -> None:
    """Raise ValueError if an axis does not divide over the mesh, and name the nearest that works.

    lengths: of axes by letter: V, D, N, K, F, and where known B (rows of a batch) and T.
    mesh: a mesh, or sizes by axis.
    sequence_parallel: whether T is split over `tp` too.
    """
    sizes = axis_sizes(mesh)
    problem = _problem(lengths, sizes, sequence_parallel=sequence_parallel)
    if problem is None:
        return
    nearest = _nearest(lengths, sizes, sequence_parallel=sequence_parallel)
    advice = f"; the nearest mesh that works is {describe(nearest)}" if nearest else ""
    raise ValueError(f"mesh {describe(sizes)}: {problem}{advice}")


def splits_tokens(asked: bool | None, length: int, *, mesh: Any | None = None) -> tuple[bool, str]:
    """Decide whether training splits the residual stream by tokens over `tp`, and say why.

    Each device of `tp` then stores a part of the residual stream instead of the whole, at the cost
    of somewhat more traffic (docs/scaling.md). It is the default wherever the tokens divide.

    asked: the user's choice, or None for the default.
    length: T.
    mesh: a mesh, or sizes by axis; None is the mesh in force.
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
    """Describe the first axis that does not divide over the mesh, or return None."""
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
        return f"{_NAMES[letter]} {letter} = {length} does not divide over {named}{twice}"
    return None


def _nearest(
    lengths: Mapping[str, int], sizes: Mapping[str, int], *, sequence_parallel: bool
) -> dict[str, int] | None:
    """Return the mesh nearest to `sizes` over which `lengths` divide (as in `check`), or None.

    It has as many devices, or else the most below, and axes changed as little as possible; of
    several, it is the one that moves devices into `fsdp`, which every program can use.
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
    """Yield every mesh of `total` devices; with lengths, as for `check`, every one that divides."""
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
    """Choose a mesh: the most devices that the model divides over, in all slices or in one.

    Decoding reads every weight for each token, so `tp` takes as many devices as it can, and rows
    the rest. Training splits rows and weights (`fsdp`); devices that the model width does not
    divide over hold copies (`data`), as slices do, and heads are split only over devices that rows
    do not divide over.
    """
    least = (TENSOR, CONTEXT, COPIES) if training else (COPIES, CONTEXT, "fsdp")
    for total in [devices] * (slices > 1) + list(range(devices // slices, 0, -1)):
        over = slices if total > devices // slices else 1
        fitting = [m for m in of_size(total, lengths) if m[COPIES] % over == 0]
        fitting = [m for m in fitting if m[CONTEXT] == m["fsdp_outer"] == 1]
        if fitting:
            return min(fitting, key=lambda m: tuple(m[axis] for axis in least))
    raise AssertionError("one device holds everything")
