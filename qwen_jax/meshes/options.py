"""Parses the command-line option `--mesh`, and makes the virtual CPU devices that a mesh needs."""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen_jax.meshes import construction
from qwen_jax.runtime import processes
from qwen_jax.runtime.command import UsageError, say

if TYPE_CHECKING:
    from jax.sharding import Mesh

_MOST = 512  # virtual CPU devices of a process


def mesh_sizes(option: str | None) -> dict[str, int]:
    """Parse the option `--mesh`, such as `fsdp=4,tp=2`, into the size of each mesh axis.

    option: None, if the option is not given, makes all sizes 1. Raises UsageError for a bad value.
    """
    try:
        return construction.parse(option)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def virtual_cpu_devices(sizes: Mapping[str, int]) -> None:
    """Make this process's share of the CPU devices that a mesh needs.

    sizes: the size of each mesh axis.

    A number of CPU devices that XLA_FLAGS sets is kept. GPUs and TPUs are not affected. A note says
    that virtual devices run on the same cores. Raises UsageError for more than `_MOST` devices,
    each of which takes memory and threads.
    """
    import jax

    own = -(-math.prod(sizes.values()) // processes.count())
    if own > 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        if own > _MOST:
            raise UsageError(
                f"--mesh: {own} devices for a process, which can have at most {_MOST} virtual "
                "ones: name a smaller mesh"
            )
        jax.config.update("jax_num_cpu_devices", own)
        if jax.default_backend() == "cpu":
            say(f"--mesh: {own} virtual devices share the cores of this CPU")


def check_used(mesh: "Mesh") -> None:
    """Raise UsageError if a process of this program has no device in a mesh."""
    import jax

    used = {device.process_index for device in mesh.devices.flat}
    if idle := [str(i) for i in range(processes.count()) if i not in used]:
        described = construction.describe(dict(mesh.shape))
        raise UsageError(
            f"mesh {described} uses no device of process {', '.join(idle)}: give a --mesh of "
            f"{jax.device_count()} devices"
        )
