"""Meshes of devices, and how arrays are partitioned over them.

This is the only room that names mesh axes. `build` makes and chooses meshes, `sharding` says how an
array is partitioned, `moves` gets it from there to where it is needed, `hardware` holds what is
published of accelerators.
"""

from qwen_jax.meshes.build import (
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
