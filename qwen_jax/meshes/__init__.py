"""Meshes of devices, and how arrays are partitioned over them.

Only this folder names mesh axes. `construction` makes and chooses meshes, `sharding` defines
partitionings, `moves` reshards arrays and copies them to and from the host, `dropout` draws the
same dropout on every mesh, `options` parses `--mesh`, and `hardware` holds published speeds and
sizes of accelerators.
"""

from qwen_jax.meshes.construction import (
    check,
    count_slices,
    current,
    default,
    describe,
    entered,
    in_planes,
    make,
    of_size,
    parse,
    splits_tokens,
)
from qwen_jax.meshes.moves import fetch

__all__ = [
    "check",
    "count_slices",
    "current",
    "default",
    "describe",
    "entered",
    "fetch",
    "in_planes",
    "make",
    "of_size",
    "parse",
    "splits_tokens",
]
