"""`Batch`, what a training step takes, and the label that marks what is not trained on."""

from typing import Any

from flax import struct

IGNORED = -100  # a label that is not trained on


@struct.dataclass
class Batch:
    """What a step trains on, [B, T] each; tokens of one row attend to their own segment only.

    tokens, targets int32: the ids, and the id after each. positions int32: within the segment, from
    0. segments int32: 0 is padding. weights float32: of each target in the loss, 0 for none.
    """

    tokens: Any
    targets: Any
    positions: Any
    segments: Any
    weights: Any
