"""Mesh axes and how arrays are partitioned over them. The only file that names mesh axes.

A partitioning is named by the axis letters of an array (legend in `model.py`): `spec("BTD")` is an
activation, `spec("FD")` a weight. `fsdp` splits the batch of activations and the model dimension of
weights; `tp` splits heads, FFN width and vocabulary. Nothing here knows of modules or files.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("fsdp", "tp")
_TENSOR_PARALLEL = frozenset("NKFV")


def spec(letters: str) -> P:
    """The partitioning of an array by its axis letters; one with a batch axis is an activation."""
    fsdp = "B" if "B" in letters else "D"
    return P(*(("fsdp" if x == fsdp else "tp" if x in _TENSOR_PARALLEL else None) for x in letters))


def parse_mesh(text: str | None) -> dict[str, int]:
    """`"fsdp=4,tp=2"` -> {"fsdp": 4, "tp": 2}; axes not named are 1.

    Raises ValueError that says what is allowed.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for item in filter(None, (text or "").split(",")):
        name, _, size = item.partition("=")
        named = [part.partition("=")[0].strip() for part in (text or "").split(",")]
        wrong = name.strip() not in AXES or named.count(name.strip()) > 1
        if wrong or not size.strip().isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: write it as fsdp=4,tp=2 (axes: {', '.join(AXES)})")
        sizes[name.strip()] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int] | None = None) -> Mesh:
    """A mesh with explicit axes over the first devices; (1, 1) by default.

    Raises ValueError when there are fewer devices than the mesh asks for.
    """
    shape = tuple((sizes or {}).get(axis, 1) for axis in AXES)
    devices = jax.devices()
    if math.prod(shape) > len(devices):
        wanted = ",".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh {wanted} needs {math.prod(shape)} devices, there are {len(devices)}"
        )
    explicit = (AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(shape, AXES, explicit, devices=devices[: math.prod(shape)])


def current_mesh() -> Mesh:
    """The mesh entered with `jax.set_mesh`, or a (1, 1) one.

    Raises ValueError when the mesh in force lacks one of `AXES` or has axes that are not explicit.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return make_mesh()
    if not set(AXES) <= set(mesh.axis_names) or set(mesh.axis_types) != {AxisType.Explicit}:
        raise ValueError(f"the mesh in force is {mesh}: it needs explicit axes {', '.join(AXES)}")
    return mesh


@contextlib.contextmanager
def entered(mesh: Mesh) -> Iterator[Mesh]:
    """Run with `mesh` in force, whatever was in force before."""
    with jax.set_mesh(mesh):
        yield mesh


def check_divides(letters: str, shape: tuple[int, ...], mesh: Mesh, name: str) -> None:
    """Raise ValueError, naming the array, when an axis does not divide over the mesh."""
    for letter, size, axis in zip(letters, shape, spec(letters), strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name} has {letter} = {size}: it does not divide over {axis}={mesh.shape[axis]}"
            )


def named(letters: str, mesh: Mesh) -> NamedSharding:
    """The sharding on real devices of an array with these axes."""
    return NamedSharding(mesh, spec(letters))


def handed_over(x: jax.Array) -> jax.Array:
    """The same buffers for callers: with no mesh entered, any jax function takes them."""
    if not jax.sharding.get_mesh().empty:
        return x
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    free = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(free, sharding.spec))


def unshard(tree: Any) -> Any:
    """Gather a tree of weights over `fsdp`, just before use; its gradient scatters back."""

    def gather(leaf: jax.Array) -> jax.Array:
        partition = jax.typeof(leaf).sharding.spec
        if "fsdp" not in partition:
            return leaf
        return jax.reshard(leaf, P(*(None if axis == "fsdp" else axis for axis in partition)))

    return jax.tree.map(gather, tree)
