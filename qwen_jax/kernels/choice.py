"""The device that a kernel is compiled for, whether it runs there, and its measured block sizes.

`measured.json` beside this file holds a line for each measurement, which `python -m
qwen_jax.kernels.tune` writes. A kernel without a line for a device was not measured there, and
"auto" proves it on the user's own (`prove.py`).
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax

TABLE = Path(__file__).with_name("measured.json")
KEYS = ("device", "kernel", "task", "head_dim", "dtype", "length")  # the keys of a line


def device() -> Any:
    """Return the device that is compiled for, with `platform` and `device_kind`.

    It is the one of the mesh in force, which this machine may lack, or else the first device here.
    """
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if of_mesh is None else of_mesh


def interpreted(name: str, platform: str) -> bool:
    """Return whether a kernel for `platform` runs interpreted, as it does on a CPU for tests.

    Raises NotImplementedError on any other device.
    """
    here = device()
    if here.platform not in (platform, "cpu"):
        raise NotImplementedError(f"{name} is for {platform}, this is {here.device_kind}")
    return here.platform == "cpu"


def need_gpu(name: str, newest_refused: float) -> None:
    """Raise NotImplementedError on a GPU whose compute capability is known to be this or less."""
    kind = device().device_kind
    for here in jax.devices():
        capability = getattr(here, "compute_capability", None)
        if here.device_kind == kind and capability and float(capability) <= newest_refused:
            raise NotImplementedError(f"{name}: {kind}, only A100 and newer")


@functools.cache
def measured() -> list[dict[str, Any]]:
    """Return all lines of `measured.json`, the table of measured kernel times."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def lines(task: str, head_dim: int, dtype: str, length: int, kernel: str | None = None) -> Any:
    """Return measured lines for this device at the nearest length, fastest first.

    task: "forward", "backward" or "decode". kernel: only lines of this kernel.
    """
    wanted = {"device": device().device_kind, "task": task, "head_dim": head_dim, "dtype": dtype}
    if kernel is not None:
        wanted["kernel"] = kernel
    found = [x for x in measured() if all(x[key] == value for key, value in wanted.items())]
    nearest = min((abs(x["length"] - length) for x in found), default=0)
    found = [x for x in found if abs(x["length"] - length) == nearest]
    return sorted(found, key=lambda x: x["milliseconds"])


def blocks(kernel: str, task: str, head_dim: int, dtype: str, length: int) -> dict[str, int]:
    """Return the best measured block sizes for this device at the nearest length, or {}."""
    found = lines(task, head_dim, dtype, length, kernel)
    return found[0]["blocks"] if found else {}
