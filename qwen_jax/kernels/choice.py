"""Finds the device that kernels are compiled for, and a kernel's measured block sizes on it.

`measured.json` beside this file holds a line for each measurement, which `python -m
qwen_jax.kernels.tune` writes. A kernel without a line for a device was not measured on one, and
"auto" tests it on the user's own (`attention/prove.py`).
"""

import functools
import json
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

import jax

TABLE = Path(__file__).with_name("measured.json")
_HOPPERS = ("H100", "H200", "H800", "H20", "GH200")
KEYS = ("device", "kernel", "task", "head_dim", "dtype", "length")  # the keys of a line


class Line(TypedDict):
    """A line of `measured.json`: a kernel's fastest block sizes for a call, and its time.

    dtype: of the keys, "int8" for a quantised cache.
    milliseconds: per call.
    tflops, gbytes_per_second: the rate of a forward or backward call, or of decoding.
    date: the day, as YYYY-MM-DD.
    """

    device: str
    kernel: str
    task: str
    head_dim: int
    dtype: str
    length: int
    blocks: dict[str, int]
    milliseconds: float
    tflops: NotRequired[float]
    gbytes_per_second: NotRequired[float]
    batch: int
    heads: int
    jax: str
    date: str


class Call(TypedDict):
    """The part of an attention call by which its lines are found; `lines` describes it."""

    head_dim: int
    dtype: str
    length: int


class Device(Protocol):
    """A device of jax, or a description of one that this machine lacks."""

    platform: str
    device_kind: str


def device() -> Device:
    """Return the device that programs are compiled for, with `platform` and `device_kind`.

    It is the device of the mesh in force, which this machine may lack, or else this machine's first
    device.
    """
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if of_mesh is None else of_mesh


def interpreted(name: str, platform: str) -> bool:
    """Return whether a kernel runs interpreted: on a CPU (for tests), but not on its own platform.

    name: the kernel's name in the error.
    platform: the kernel's platform, "tpu" or "gpu".

    Raises NotImplementedError on any other device.
    """
    here = device()
    if here.platform not in (platform, "cpu"):
        raise NotImplementedError(f"{name} is for {platform}, this is {here.device_kind}")
    return here.platform == "cpu"


def need_gpu(name: str, newest_refused: float) -> None:
    """Raise NotImplementedError on a GPU that is known to be too old for a kernel.

    name: the kernel's name in the error.
    newest_refused: the highest compute capability that is refused, such as 7.5.
    """
    kind = device().device_kind
    for here in jax.devices():
        capability = getattr(here, "compute_capability", None)
        if here.device_kind == kind and capability and float(capability) <= newest_refused:
            raise NotImplementedError(f"{name}: {kind}, only A100 and newer")


def is_hopper(device: Device) -> bool:
    """Return whether a device is a Hopper GPU, by compute capability.

    A device for which programs are only compiled has no compute capability, and is known by name.
    """
    if device.platform != "gpu":
        return False
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return any(name in device.device_kind for name in _HOPPERS)
    return str(capability).startswith("9.")


@functools.cache
def measured() -> list[Line]:
    """Return all lines of `measured.json`, the table of measured kernel times."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def lines(
    task: str, *, head_dim: int, dtype: str, length: int, kernel: str | None = None
) -> list[Line]:
    """Return the measured lines for this device at the length nearest to `length`, fastest first.

    task: "forward", "backward" or "decode".
    head_dim, dtype: the length H of a head, and the dtype of the keys, "int8" for a quantised
        cache.
    kernel: the name of the only kernel to return lines of; None for all.
    """
    wanted = {"device": device().device_kind, "task": task, "head_dim": head_dim, "dtype": dtype}
    if kernel is not None:
        wanted["kernel"] = kernel
    found = [x for x in measured() if all(x[key] == value for key, value in wanted.items())]
    nearest = min((abs(x["length"] - length) for x in found), default=0)
    found = [x for x in found if abs(x["length"] - length) == nearest]
    return sorted(found, key=lambda x: x["milliseconds"])


def blocks(kernel: str, task: str, *, head_dim: int, dtype: str, length: int) -> dict[str, int]:
    """Return a kernel's fastest measured block sizes for this device, or {} if it was not measured.

    task: "forward", "backward" or "decode".
    dtype: the dtype of the keys, "int8" for a quantised cache.
    length: the number of keys; lines at the nearest measured length are taken.
    """
    found = lines(task, head_dim=head_dim, dtype=dtype, length=length, kernel=kernel)
    return found[0]["blocks"] if found else {}
