"""`Batch`, the input of a training step, and `IGNORED`, the label of tokens outside the loss."""

from typing import Any

from flax import struct
from jaxtyping import Float, Int

IGNORED = -100  # a label that is not trained on


@struct.dataclass
class Batch:
    """The input of a training step, [B, T] each (or one row of it, [T]), in which tokens attend
    only within their own segment. Arrays of numpy, of jax, or shapes alone.

    tokens, targets: int32, the ids, and the next id after each. positions: int32, the places within
    the segment, from 0. segments: int32, the number of the segment; 0 is padding. weights: float32,
    the weight of each target in the loss.
    """

    tokens: Int[Any, "*B T"]
    targets: Int[Any, "*B T"]
    positions: Int[Any, "*B T"]
    segments: Int[Any, "*B T"]
    weights: Float[Any, "*B T"]
