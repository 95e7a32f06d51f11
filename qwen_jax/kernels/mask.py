"""The attention mask (`Mask`): positions, segments and a window, never an array [T, S]."""

from flax import struct
from jaxtyping import Array, Bool, Int

FULL = 2**30  # a window that no length reaches


@struct.dataclass
class Mask:
    """A sliding-window causal mask over packed and padded sequences.

    A query attends to a key if both have the same segment, that segment is not 0, the key is not
    after the query, and it is fewer than `window` tokens before it (with a window of 1 a query sees
    its own token alone).

    q_positions, k_positions: int32 [B, T] and [B, S], the position of each token in its sequence.
    q_segments, k_segments: int32 [B, T] and [B, S], equal for the tokens of one sequence in a batch
        row; 0 for padding and for an empty slot of a cache.
    window: int32 [], in tokens.
    """

    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    k_segments: Int[Array, "B S"]
    window: Int[Array, ""]

    def visible(self) -> Bool[Array, "B T S"]:
        """Return the dense mask, bool [B, T, S]: whether each query attends to each key."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        same = self.q_segments[:, :, None] == self.k_segments[:, None, :]
        real = self.k_segments[:, None, :] != 0
        return same & real & (distance >= 0) & (distance < self.window)
