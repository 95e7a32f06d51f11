"""The command-line option `--mesh`: parsed, and given as many virtual CPU devices as it needs."""

import math
import os
from collections.abc import Mapping

from qwen_jax.meshes import build
from qwen_jax.runtime import processes
from qwen_jax.runtime.command import UsageError


def mesh_sizes(option: str | None) -> dict[str, int]:
    """Parse `--mesh` into sizes by axis, all 1 without it. Raises UsageError for a bad value."""
    try:
        return build.parse(option)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def virtual_cpu_devices(sizes: Mapping[str, int]) -> None:
    """Make as many CPU devices as the mesh needs. An accelerator's number is fixed."""
    import jax

    own = -(-math.prod(sizes.values()) // processes.count())
    if own > 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", own)
