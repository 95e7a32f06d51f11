"""`Batch`, the input of a training step, and `IGNORED`, the label of tokens outside the loss."""

from typing import Any

from flax import struct

IGNORED = -100  # a label that is not trained on


@struct.dataclass
class Batch:
    """The input of a training step, [B, T] each; tokens attend only within their own segment.

    tokens, targets int32: the ids, and the next id of each. positions int32: within the segment,
    from 0. segments int32: 0 is padding. weights float32: of each target in the loss.
    """

    tokens: Any
    targets: Any
    positions: Any
    segments: Any
    weights: Any
