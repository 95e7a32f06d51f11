"""The decoder: its mathematics, RoPE, and the vocabulary at both of its ends.

Nothing here knows of files, of sampling, or of how a leaf is stored.
"""

from qwen_jax.model.decoder import (
    GROUP,
    Block,
    Decoder,
    Dropout,
    FeedForward,
    Groups,
    Output,
    abstract,
    create,
    drop,
    groups,
    logits,
    rms_norm,
    run_group,
    stack,
    unstack,
)

__all__ = [
    "GROUP",
    "Block",
    "Decoder",
    "Dropout",
    "FeedForward",
    "Groups",
    "Output",
    "abstract",
    "create",
    "drop",
    "groups",
    "logits",
    "rms_norm",
    "run_group",
    "stack",
    "unstack",
]
