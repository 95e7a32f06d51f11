"""Dropout with the same random draws on every mesh: they depend on row, place and column alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax.meshes import moves


@struct.dataclass
class Dropout:
    """The dropout of a training step: of the embeddings, and of both branches of each block.

    key: the PRNG key of the step or, within a pass, of a layer.
    rate: the share of elements set to 0; the others are scaled up.
    """

    key: jax.Array
    rate: float = struct.field(pytree_node=False)

    def of_embeddings(self, x: jax.Array) -> jax.Array:
        return self._drop(x, 0)

    def of_attention(self, x: jax.Array) -> jax.Array:
        return self._drop(x, 1)

    def of_feed_forward(self, x: jax.Array) -> jax.Array:
        return self._drop(x, 2)

    def in_layer(self, layer: Any) -> "Dropout":
        return Dropout(jax.random.fold_in(self.key, 3 + layer), self.rate)

    def _drop(self, x: jax.Array, place: int) -> jax.Array:
        return drop(x, jax.random.fold_in(self.key, place), rate=self.rate)


def drop(x: Float[Array, "B T D"], key: jax.Array, *, rate: float) -> jax.Array:
    """Set the share `rate` of the elements of x [B, T, ...] to 0; divide the rest by 1 - rate.

    An element's draw (Threefry, as in `jax.random`) depends on the key, its row, its token's place
    in the sequence (before `moves.zigzag`) and its column, so it is the same on every mesh.
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
