"""The Qwen decoder: its layers, RoPE, and the embedding and logits at its two ends.

Begin with `decoder.py`. Nothing here knows of files, of sampling, or of how a weight is stored.
"""

from qwen_jax.model.build import abstract, create, stack, unstack
from qwen_jax.model.decoder import Block, Decoder, FeedForward, Output
from qwen_jax.model.norm import rms_norm
from qwen_jax.model.vocabulary import logits

__all__ = [
    "Block",
    "Decoder",
    "FeedForward",
    "Output",
    "abstract",
    "create",
    "logits",
    "rms_norm",
    "stack",
    "unstack",
]
