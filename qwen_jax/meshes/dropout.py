"""Dropout whose random draws are the same on every mesh.

A draw depends on the key and on the element's place in the global array alone: its sequence in the
batch, its token and its column.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax.meshes import moves


@struct.dataclass
class Dropout:
    """The dropout of one training step: of the embeddings, and of both branches of each block.

    key: the PRNG key of the training step or, from `in_layer`, of one layer.
    rate: the share of elements that are set to 0; the others are divided by 1 - rate.
    """

    key: jax.Array
    rate: float = struct.field(pytree_node=False)

    def of_embeddings(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drop elements of the embeddings."""
        return self._drop(x, 0)

    def after_attention(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drop elements of an attention's output, before the residual sum."""
        return self._drop(x, 1)

    def after_feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Drop elements of a feed-forward network's output, before the residual sum."""
        return self._drop(x, 2)

    def in_layer(self, layer: Int[Array, ""]) -> "Dropout":
        """Return the dropout of one layer, which has a PRNG key of its own."""
        return Dropout(jax.random.fold_in(self.key, 3 + layer), self.rate)

    def _drop(self, x: jax.Array, place: int) -> jax.Array:
        return drop(x, jax.random.fold_in(self.key, place), rate=self.rate)


def drop(x: Float[Array, "B T D"], key: jax.Array, *, rate: float) -> Float[Array, "B T D"]:
    """Set a random share `rate` of the elements of x [B, T, D] to 0; divide the rest by 1 - rate.

    The draw of an element (Threefry, as in `jax.random`) depends on the key, its sequence in the
    batch, its token's position before `moves.zigzag` reorders tokens, and its column, so it is the
    same on every mesh.
    """
    length = x.shape[1]
    spec = P(*jax.typeof(x).sharding.spec.partitions)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, x.shape, out_sharding=spec)
    order = jax.reshard(jnp.asarray(moves.zigzag_order(length), jnp.uint32), P(spec[1]))
    places = jax.lax.broadcast_in_dim(order, x.shape, (1,), out_sharding=spec)
    words = jax.random.key_data(key)
    draw, _ = threefry2x32_p.bind(words[0], words[1], iota(0) * length + places, iota(2))
    kept = draw < np.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
