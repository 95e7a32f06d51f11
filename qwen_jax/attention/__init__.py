"""Attention: the XLA reference, a registry of implementations and their self-tests on the device,
ring attention, and the KV cache.

Nothing here knows of RoPE, of layers or of files.
"""

from qwen_jax.attention.reference import Attend, xla
from qwen_jax.attention.registry import (
    DECODERS,
    FEW,
    IMPLEMENTATIONS,
    RESOLVED,
    Chosen,
    auto,
    cached,
    decoder,
    get,
    on_shards,
    pallas_hopper,
    pallas_tpu,
    pallas_triton,
    resolved,
    say,
)
from qwen_jax.kernels.flash import KeysOrValues
from qwen_jax.kernels.mask import FULL, Mask

__all__ = [
    "DECODERS",
    "FEW",
    "FULL",
    "IMPLEMENTATIONS",
    "RESOLVED",
    "Attend",
    "Chosen",
    "KeysOrValues",
    "Mask",
    "auto",
    "cached",
    "decoder",
    "get",
    "on_shards",
    "pallas_hopper",
    "pallas_tpu",
    "pallas_triton",
    "resolved",
    "say",
    "xla",
]
