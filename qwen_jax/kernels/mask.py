"""`Mask`: which keys a query sees, by positions, segments and a window, never as [T, S]."""

import jax
from flax import struct

FULL = 2**30  # a window that no length reaches


@struct.dataclass
class Mask:
    """A sliding-window causal mask over packed and padded sequences.

    A query attends to a key if both have the same segment, that segment is not 0 (padding or an
    empty slot), the key is not after the query, and it is fewer than `window` tokens before it (the
    query's own token counts).

    q_positions, q_segments: int32 [B, T].
    k_positions, k_segments: int32 [B, S].
    window: int32 [].
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array
    k_segments: jax.Array
    window: jax.Array

    def visible(self) -> jax.Array:
        """Compute the dense mask, bool [B, T, S]."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        same = self.q_segments[:, :, None] == self.k_segments[:, None, :]
        real = self.k_segments[:, None, :] != 0
        return same & real & (distance >= 0) & (distance < self.window)
