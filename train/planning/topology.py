"""Describes devices that are not attached: their topology, meshes of them, the links of each axis.

The compilers for TPUs and GPUs run on any machine; `prepare` sets the environment variables that
they need. Needs the packages of the `aot` extra. Knows no model and no program.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import site
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from qwen_jax import meshes
from qwen_jax.meshes.hardware import CHIPS, Gpu, Tpu

_SPELLINGS = {"7x": "tpu7x", "v7x": "tpu7x"}  # other spellings -> the one that libtpu knows
_LONGEST = 16  # the most chips along a side of a two-dimensional slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """The planned accelerators and how they are connected.

    chip: the kind of TPU chip or GPU.
    lengths: the sides of a TPU slice's torus in chips, or (hosts, GPUs per host).
    slices: the number of such slices, which the slower network connects.
    """

    chip: Tpu | Gpu
    lengths: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """The number of jax devices; a TPU chip may have several cores."""
        cores = self.chip.cores if isinstance(self.chip, Tpu) else 1
        return self.slices * math.prod(self.lengths) * cores

    @property
    def network(self) -> str:
        """The kind of link between TPU slices or GPU hosts; "" if there is only one of them."""
        if isinstance(self.chip, Gpu):
            return "InfiniBand" if self.slices * self.lengths[0] > 1 else ""
        return "DCN" if self.slices > 1 else ""

    def __str__(self) -> str:
        times = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.lengths))}{times}"


def parse(text: str) -> Topology:
    """Parse a topology: `v5p:8x8x8`, `v5e:16x16*2` (two slices), `h100:8x8` (8 hosts), `h100:8`.

    Raises ValueError that says what is allowed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text.strip())
    name = found.group(1).lower() if found else ""
    chip = CHIPS.get(_SPELLINGS.get(name, name))
    if not found or chip is None:
        raise ValueError(
            f"topology {text!r}: write CHIP:SIZE, as v5p:8x8x8, v5e:16x16*2 (slices) or h100:8x8 "
            f"(hosts x GPUs); chips: {', '.join(CHIPS)}"
        )
    lengths = tuple(int(x) for x in found.group(2).split("x"))
    if isinstance(chip, Gpu) and len(lengths) == 1:
        lengths = (1, *lengths)
    wanted = chip.torus if isinstance(chip, Tpu) else 2
    if len(lengths) != wanted or 0 in lengths or found.group(3) == "0":
        shape = "hosts x GPUs" if isinstance(chip, Gpu) else f"{wanted} lengths"
        raise ValueError(f"topology {text!r}: {chip.name} takes {shape}, each at least 1")
    if isinstance(chip, Tpu) and len(lengths) == 2 and max(lengths) > _LONGEST:
        most = f"{_LONGEST}x{_LONGEST}"
        raise ValueError(f"topology {text!r}: a slice is {most} at most; take several, as {most}*2")
    return Topology(chip, lengths, int(found.group(3) or 1))


def prepare(platform: str) -> None:
    """Set the environment variables that a platform's compiler reads when it starts.

    platform: "tpu" or "cuda". Raises ValueError if the compiler's package is not installed.
    """
    package, name = {
        "tpu": ("libtpu", "libtpu"),
        "cuda": ("jax_plugins.xla_cuda13", "jax-cuda13-plugin"),
    }[platform]
    if not _is_installed(package):
        raise ValueError(
            f"compiling for {platform} needs the package {name}: pip install -e '.[aot]', in "
            "an environment of its own"
        )
    # Programs for absent devices would be written to jax's cache, from which they cannot be read.
    jax.config.update("jax_enable_compilation_cache", False)
    if platform == "tpu":  # without these, libtpu looks for a TPU
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"  # any type: without one it complains
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # otherwise libtpu locks the whole machine
        return
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    ptxas = f"{site.getsitepackages()[0]}/nvidia/cu13/bin"
    if ptxas not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{ptxas}{os.pathsep}{os.environ['PATH']}"


def _is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def devices(topology: Topology) -> tuple[Any, ...]:
    """Return jax's descriptions of a topology's devices, slice by slice; GPUs also host by host.

    Raises ValueError if the compiler does not know the topology.
    """
    chip = topology.chip
    prepare(chip.platform)
    options: dict[str, Any] = {}
    name = str(dataclasses.replace(topology, slices=1))
    if isinstance(chip, Gpu):
        name = chip.kind
        options["target_config"] = chip.config
        options["topology"] = "x".join(map(str, (topology.slices, *topology.lengths)))
    else:
        options |= {"num_slices": topology.slices} if topology.slices > 1 else {}
        options |= {"chip_config_name": chip.config} if chip.config else {}
    try:
        described = topologies.get_topology_desc(name, platform=chip.platform, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology}: {str(error).splitlines()[0]}") from error
    return tuple(described.devices)


def mesh(topology: Topology, sizes: Mapping[str, int]) -> Mesh:
    """Make a mesh over all devices of a topology. sizes: the number of devices along each axis.

    Raises ValueError if the sizes do not make up the number of devices.
    """
    count = math.prod(sizes.values())
    if count != topology.devices:
        raise ValueError(
            f"mesh {meshes.describe(sizes)} has {count} devices, {topology} {topology.devices}: "
            f"its axes must multiply to {topology.devices}, as fsdp={topology.devices} does"
        )
    return meshes.make(sizes, devices(topology))


@dataclasses.dataclass(frozen=True)
class Link:
    """A kind of link that a collective goes over, with its rates.

    name: the kind of link, such as "ICI" or "NVLink".
    bandwidth: the bytes/s that each device receives in a ring (or through a switch).
    one_way: the bytes/s from a device to one other device.
    size: the number of members of the ring: devices, hosts or slices.
    crossing: on a torus, the largest over its dimensions of the ring length (in hops) times the
        ratio of `bandwidth` to that dimension's rate: the middle of that dimension limits an
        all-to-all. 0 behind a switch.
    """

    name: str
    bandwidth: float
    one_way: float
    size: int
    crossing: float = 0


def links(topology: Topology, mesh: Mesh, *, axes: Sequence[str]) -> list[Link]:
    """Return all kinds of link that a collective over these mesh axes goes over."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = mesh.devices[index].reshape(-1)
    chip = topology.chip
    if isinstance(chip, Gpu):
        places = np.array([device.coords for device in group])  # slice, host, GPU
        hosts = len({tuple(place[:2]) for place in places})
        here = len(group) // hosts
        found = [Link("NVLink", chip.link, chip.link, here)] if here > 1 else []
        if hosts > 1:
            found.append(Link(topology.network, here * chip.network, chip.network, hosts))
        return found
    of_slice = [getattr(device, "slice_index", 0) for device in group]  # none in a single slice
    slices = len(set(of_slice))
    first = [x for x, number in zip(group, of_slice, strict=True) if number == of_slice[0]]
    found = _torus(topology, chip, group=first) if len(first) > 1 else []
    if slices > 1:
        found.append(Link(topology.network, len(first) * chip.network, chip.network, slices))
    return found


def _torus(topology: Topology, chip: Tpu, *, group: Sequence[Any]) -> list[Link]:
    """Return the kinds of link in a TPU slice that a group of its devices uses.

    chip: the kind of TPU. group: the jax devices of the group, all in one slice.
    """
    places = np.array([device.coords for device in group])[:, : chip.torus]
    lengths = np.array(topology.lengths)
    cores = len({device.core_on_chip for device in group})
    found = [Link("on chip", chip.on_chip, chip.on_chip, cores)] if cores > 1 else []
    # If a group has one core of each chip, another group has the other cores and shares the links.
    link = chip.link * cores / chip.cores
    wrapped = lengths % chip.wraps == 0
    if chip.torus == 3:
        wrapped = np.full(3, wrapped.all())
    rates: list[tuple[float, int]] = []  # per dimension of the group: bytes/s, and devices along it
    one_way = 0.0
    for places_along, length, wraps in zip(places.T, lengths, wrapped, strict=True):
        along = np.unique(places_along)
        if len(along) == 1:
            continue
        # Interleaved groups share the links.
        stride = int(np.min(np.diff(along)))
        ring = wraps and len(along) * stride == length
        rates.append(((2 if ring else 1) * link / stride, len(along)))
        one_way = max(one_way, link / stride)
    if rates:
        total = sum(rate for rate, _ in rates)
        crossing = max(hops * total / rate for rate, hops in rates)
        found.append(Link("ICI", total, one_way, len(group) // cores, crossing))
    return found
