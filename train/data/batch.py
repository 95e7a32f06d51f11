"""`Batch`, the input of a training step, and `IGNORED`, the label of tokens outside the loss."""

from typing import Any

from flax import struct
from jaxtyping import Float, Int

from qwen_jax.chat.examples import IGNORED

__all__ = ["IGNORED", "Batch"]


@struct.dataclass
class Batch:
    """The input of a training step, [B, T] each; tokens attend only within their own segment.

    tokens: int32, the token ids.
    targets: int32, the id that follows each token.
    positions: int32, the position of each token within its segment, from 0.
    segments: int32, the number of each token's segment in its row, from 1; 0 is padding.
    weights: float32, the weight of each target in the loss.
    """

    tokens: Int[Any, "*B T"]
    targets: Int[Any, "*B T"]
    positions: Int[Any, "*B T"]
    segments: Int[Any, "*B T"]
    weights: Float[Any, "*B T"]
