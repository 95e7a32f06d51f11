"""The context of a forward pass: what its blocks share, and the interface of a KV cache.

A KV cache of any type that has the methods of `KVCache` and `KVCacheLayer` runs through the decoder
unchanged; the one that `generate` uses is in `attention/cache.py`.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qwen_jax import attention
from qwen_jax.attention import Attend, Mask
from qwen_jax.config import Config
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import rope


class KVCacheLayer(Protocol):
    """The interface of one layer's KV cache, which `attention/cache.py` implements.

    `attend` returns softmax attention of q [B, T, N, H] over this pass's k, v [B, T, K, H] and the
    cached ones, and the cache with both. past and index are the results of `KVCache.context`.
    """

    def attend(
        self,
        implementation: Attend,
        q: Float[Array, "B T N H"],
        *,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        own: Mask,
        past: Mask | None,
        scale: Float[Array, "B T"],
        index: Any,
    ) -> "tuple[jax.Array, KVCacheLayer]": ...


class KVCache(Protocol):
    """The interface of a whole model's KV cache.

    `layers` holds a part for each layer. `context` returns the mask over cached keys and the index
    at which layers write. `advanced` returns the cache after a pass that wrote `length` tokens.
    """

    @property
    def layers(self) -> "tuple[KVCacheLayer, ...]": ...

    def context(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Mask | None, Any]: ...

    def advanced(self, layers: Any, length: int) -> "KVCache": ...


@struct.dataclass
class Context:
    """The values that all blocks of a forward pass share.

    rotary: the rotation of queries and keys.
    own: a mask over this pass's keys.
    past: a mask over the cached keys; None without a cache, or while it is empty.
    index: where the layers write into the cache, in the cache's own terms; None without one.
    dropout: the dropout of a training step, else None.
    implementation: a function of `attention.IMPLEMENTATIONS`.
    """

    rotary: rope.Rotary
    own: Mask
    past: Mask | None
    index: Any
    dropout: Dropout | None
    implementation: Attend = struct.field(pytree_node=False)

    @staticmethod
    def of_pass(
        config: Config,
        positions: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"],
        frequencies: Float[Array, "B pairs"],
        cache: KVCache | None,
        attend: Attend,
        dropout: Dropout | None = None,
    ) -> "Context":
        """Compute the context of a forward pass. The arguments are those of a call of `Decoder`."""
        scheme = rope.from_config(config)
        rotary, own = _rotary_and_mask(positions, segments, frequencies=frequencies, scheme=scheme)
        past, index = (None, None) if cache is None else cache.context(positions, segments)
        return Context(rotary, own, past, index, dropout, attend)

    def in_layer(self, number: Int[Array, ""], window: Int[Array, ""]) -> "Context":
        """Return the context of one layer, which attends to the last `window` tokens."""
        own = dataclasses.replace(self.own, window=window)
        past = self.past and dataclasses.replace(self.past, window=window)
        dropout = self.dropout and self.dropout.in_layer(number)
        return dataclasses.replace(self, own=own, past=past, dropout=dropout)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        *,
        v: Float[Array, "B T K H"],
        scale: Float[Array, "#B #T"],
        cache: KVCacheLayer | None,
    ) -> tuple[Float[Array, "B T N H"], KVCacheLayer | None]:
        """Compute softmax attention over this pass's keys and those in the cache, if there is one.

        Returns the result, and the cache with this pass's keys and values.
        """
        if cache is None:
            return attention.on_shards(self.implementation)(q, k, v, self.own, scale), None
        masks = {"own": self.own, "past": self.past}
        return cache.attend(
            self.implementation, q, k=k, v=v, **masks, scale=scale, index=self.index
        )


@functools.partial(jax.jit, static_argnames="scheme")
def _rotary_and_mask(
    positions: jax.Array, segments: jax.Array, *, frequencies: jax.Array, scheme: rope.Rope
) -> tuple[rope.Rotary, Mask]:
    own = Mask(positions, positions, segments, segments, jnp.int32(0))  # in_layer sets the window
    return rope.rotary(scheme, positions, frequencies=frequencies), own
