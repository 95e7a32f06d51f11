"""Which keys a query sees: `Mask`, said by positions, segments and a window, never as [T, S]."""

import jax
from flax import struct

FULL = 2**30  # a window that no length reaches


@struct.dataclass
class Mask:
    """A key counts iff its segment equals the query's and is not 0 (padding, an empty slot), it is
    not after the query, and fewer than `window` tokens before it (itself included).

    Positions and segments are int32 [B, T] for queries, [B, S] for keys; window is an int32 scalar.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array
    k_segments: jax.Array
    window: jax.Array

    def visible(self) -> jax.Array:
        """bool [B, T, S]."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        same = self.q_segments[:, :, None] == self.k_segments[:, None, :]
        real = self.k_segments[:, None, :] != 0
        return same & real & (distance >= 0) & (distance < self.window)
