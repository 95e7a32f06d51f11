"""Attention: the XLA reference, a registry of implementations and their self-tests on the device,
ring attention, and the KV cache.

Nothing here knows of RoPE, of layers or of files.
"""

from qwen_jax.attention.reference import Attend, xla
from qwen_jax.attention.registry import FEW, IMPLEMENTATIONS, Implementation, auto, get, on_shards
from qwen_jax.kernels.flash import KeysOrValues, Scale
from qwen_jax.kernels.mask import FULL, Mask

__all__ = [
    "FEW",
    "FULL",
    "IMPLEMENTATIONS",
    "Attend",
    "Implementation",
    "KeysOrValues",
    "Mask",
    "Scale",
    "auto",
    "get",
    "on_shards",
    "xla",
]
