"""Mesh axes and how arrays are partitioned over them. The only file that names mesh axes.

A partitioning is named by the axis letters of an array (legend in `model.py`): `spec("BTD")` is an
activation, `spec("FD")` a weight.

    data         copies of the model: splits the batch; for slices that a slow network connects
    fsdp         splits the batch of activations, and the model dimension of weights
    fsdp_outer   the same, in a step of its own; `make_mesh` splits it off where it is faster
    context      splits the tokens of a sequence (ring attention), and weights as fsdp does
    tp           splits heads, FFN width and vocabulary

Axes of size 1 appear in no partitioning. Nothing here knows of modules or files.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
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
_MOST_TRIED = 2**13  # devices of a mesh that is suggested
_TENSOR_PARALLEL = frozenset("NKQUFV")


def spec(letters: str, lengths: Mapping[str, int] | None = None, mesh: Any = None) -> P:
    """The partitioning of an array by its axis letters; one with a batch axis is an activation.

    lengths: of axes by letter, where they are known: key/value heads fewer than `tp` stay whole.
    mesh: None is the one in force.
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


def parse_mesh(text: str | None) -> dict[str, int]:
    """`"fsdp=4,tp=2"` -> {"data": 1, "fsdp": 4, ...}; axes not named are 1.

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
    """The inverse of `parse_mesh`: axes of size 1 are left out."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "fsdp=1"


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """A mesh with explicit axes over the first devices, all axes 1 by default.

    devices: None is all of this run's, over all processes. Of several TPU slices, `data` goes over
    slices before anything else. Raises ValueError when there are fewer devices than the mesh asks
    for, or when another axis would go over slices.
    """
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


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each TPU slice; of others all together: their hosts are no slices."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        found.setdefault(index, []).append(device)
    return list(found.values())


def count_slices(devices: Sequence[Any]) -> int:
    """Of how many TPU slices devices are; 1 for others."""
    return len(_slices(devices))


def in_planes(mesh: Mesh) -> Mesh:
    """A mesh of all `AXES`, with `fsdp_outer` split off `fsdp` where that is faster."""
    outer = _planes(mesh)
    if outer == 1:
        return mesh
    split = {**mesh.shape, "fsdp_outer": outer, "fsdp": mesh.shape["fsdp"] // outer}
    devices = mesh.devices.reshape(tuple(split.values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _planes(mesh: Mesh) -> int:
    """Into how many equal parts `fsdp` falls, each in a plane of a 3-D torus; 1 where it is flat.

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


def current_mesh() -> Mesh:
    """The mesh entered with `jax.set_mesh`, or one of a single device.

    Raises ValueError when the mesh in force has other axes than `AXES`, or some not explicit.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return make_mesh()
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


def check(lengths: Mapping[str, int], mesh: Any, sequence_parallel: bool = False) -> None:
    """Raise ValueError when an axis does not divide over the mesh, naming the nearest that works.

    lengths: of axes by letter: V, D, N, K, F, and B (rows of a batch) and T where they are known.
    mesh: a mesh, or sizes by axis. sequence_parallel: T is split over `tp` too.
    """
    sizes = axis_sizes(mesh)
    problem = _problem(lengths, sizes, sequence_parallel)
    if problem is None:
        return
    nearest = _nearest(lengths, sizes, sequence_parallel)
    advice = f"; the nearest mesh that works is {describe(nearest)}" if nearest else ""
    raise ValueError(f"mesh {describe(sizes)}: {problem}{advice}")


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
    lengths: Mapping[str, int], sizes: Mapping[str, int], sequence_parallel: bool = False
) -> str | None:
    tokens = (CONTEXT, TENSOR) if sequence_parallel else (CONTEXT,)
    over = {"B": BATCH, "D": WEIGHTS, "T": tokens} | dict.fromkeys("NFVK", (TENSOR,))
    for letter, axes in over.items():
        parts = math.prod(sizes[axis] for axis in axes)
        length = lengths.get(letter)
        pieces = letter == "T" and sizes[CONTEXT] > 1
        if pieces:  # a device holds one from the front and one from the back
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
    lengths: Mapping[str, int], sizes: Mapping[str, int], sequence_parallel: bool
) -> dict[str, int] | None:
    """The mesh of as many devices, or of the most below, whose axes are changed least; of several
    the one that takes devices into `fsdp`, which every program can use.
    """

    def changed(mesh: dict[str, int]) -> tuple[float, ...]:
        moved = sum(abs(math.log2(mesh[axis] / sizes[axis])) for axis in AXES)
        return moved, mesh[CONTEXT], mesh["fsdp_outer"], mesh[COPIES]

    for total in range(min(math.prod(sizes.values()), _MOST_TRIED), 0, -1):
        if fitting := list(meshes(total, lengths, sequence_parallel)):
            return min(fitting, key=changed)
    return None


def meshes(
    total: int, lengths: Mapping[str, int] | None = None, sequence_parallel: bool = False
) -> Iterator[dict[str, int]]:
    """Every mesh of that many devices; with lengths (as for `check`), every one that divides."""
    lengths = lengths or {}
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    divisors = sorted({*small, *(total // n for n in small)})

    def divides(mesh: Mapping[str, int]) -> bool:
        return _problem(lengths, axis_sizes(mesh), sequence_parallel) is None

    *some, last = ([n for n in divisors if divides({axis: n})] for axis in AXES)
    for sizes in itertools.product(*some):
        rest, left = divmod(total, math.prod(sizes))
        mesh: dict[str, int] = dict(zip(AXES, (*sizes, rest), strict=True))
        if left == 0 and rest in last and divides(mesh):
            yield mesh


def default(
    lengths: Mapping[str, int], devices: int, training: bool = False, slices: int = 1
) -> dict[str, int]:
    """The mesh to use when none is asked for: the most devices that divide, of all slices or one.

    Decoding reads every weight for each token, so `tp` takes as many as it can, and rows the rest.
    Training splits rows and weights (`fsdp`); what the model width does not divide over holds
    copies (`data`), as slices do, and only what rows do not divide over splits heads.
    """
    least = (TENSOR, CONTEXT, COPIES) if training else (COPIES, CONTEXT, "fsdp")
    for total in [devices] * (slices > 1) + list(range(devices // slices, 0, -1)):
        over = slices if total > devices // slices else 1
        fitting = [m for m in meshes(total, lengths) if m[COPIES] % over == 0]
        fitting = [m for m in fitting if m[CONTEXT] == m["fsdp_outer"] == 1]
        if fitting:
            return min(fitting, key=lambda m: tuple(m[axis] for axis in least))
    raise AssertionError("one device holds everything")


def named(letters: str, mesh: Any, lengths: Mapping[str, int] | None = None) -> NamedSharding:
    """The sharding on real devices of an array with these axes; arguments as `spec`."""
    return NamedSharding(mesh, spec(letters, lengths, mesh))


def on_devices(mesh: Mesh, tree: Any) -> Any:
    """Shapes with partitionings, as `jax.eval_shape` gives them -> with shardings on the devices
    of a mesh, which need not be there.
    """

    def one(x: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, P() if x.sharding is None else x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, tree)


def place(value: np.ndarray, letters: str, lengths: Mapping[str, int] | None = None) -> jax.Array:
    """A host array on the mesh in force. With several processes, all have the same array."""
    sharding = named(letters, jax.sharding.get_mesh(), lengths)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process; all of them must call it."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        mesh = jax.sharding.get_mesh()
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(x)
    return np.asarray(x if x.is_fully_addressable else x.addressable_data(0))


def handed_over(x: jax.Array) -> jax.Array:
    """The same buffers for callers: with no mesh entered, any jax function takes them."""
    if not jax.sharding.get_mesh().empty:
        return x
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    free = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(free, sharding.spec))


def unshard(tree: Any, dtype: Any = None) -> Any:
    """Weights just before their use: cast, then gathered over the axes that split weights.

    The gradient scatters back. dtype: None keeps each leaf's own.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        leaf = leaf if dtype is None else leaf.astype(dtype)
        partition = [entries(entry) for entry in jax.typeof(leaf).sharding.spec.partitions]
        split = [i for i, axes in enumerate(partition) if set(axes) & set(WEIGHTS)]
        if not split:
            return leaf
        if leaf.ndim == 1:
            return jax.reshard(leaf, P(None))
        # Along the first axis, where the parts lie one behind the other.
        leaf = jnp.moveaxis(leaf, split[0], 0)
        partition.insert(0, partition.pop(split[0]))
        # `reduced` says of a copy that its gradient is still to be summed: each step back sums over
        # one mesh axis and scatters, and the copies of `data` add up what is left.
        first, *others = partition
        summed: frozenset[str] = frozenset()
        if axis_sizes()[COPIES] > 1:
            summed |= {COPIES}
            leaf = jax.reshard(leaf, P(*map(_entry, partition), reduced=summed))
        for axis in reversed([axis for axis in first if axis in WEIGHTS]):
            summed |= {axis}
            first = tuple(a for a in first if a != axis)
            leaf = jax.reshard(leaf, P(_entry(first), *map(_entry, others), reduced=summed))
        return jnp.moveaxis(leaf, 0, split[0])

    return jax.tree.map(gather, tree)


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
    """An activation [B, T, D] with its tokens split over `tp` too, as a residual may be kept."""
    rows, tokens, *rest = jax.typeof(x).sharding.spec
    return jax.reshard(x, P(rows, _with(tokens, TENSOR), *rest))


def to_columns(x: jax.Array, split: bool = True) -> jax.Array:
    """An activation [B, T, D] as column-parallel products take it: all tokens on each device of
    `tp`. The gradients of all products with one result are summed over `tp` once.

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
    """Keys or values [B, T, K, H]: heads fewer than `tp` repeated, one for each device."""
    batch, length, heads, dim = x.shape
    held = held_heads(heads)
    if held == heads:
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, held // heads, dim))
    return jax.reshard(x.reshape(batch, length, held, dim), spec("BTKH"))


def _with(entry: Any, axis: str) -> Any:
    return _entry((*entries(entry), *((axis,) if axis_sizes()[axis] > 1 else ())))


def entries(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _entry(axes: tuple[str, ...]) -> Any:
    """The inverse of `entries`."""
    return axes if len(axes) > 1 else axes[0] if axes else None
