"""The context of a forward pass: what its blocks share, and the interface of a KV cache.

A KV cache of any type that has the methods of `KVCache` and `KVCacheLayer` runs through the decoder
unchanged; the one that `generate` uses is in `attention/cache.py`.
"""

import dataclasses
import functools
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from qwen_jax import attention
from qwen_jax.attention import Attend, Mask, Scale
from qwen_jax.config import Config
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import rope


class KVCacheLayer(Protocol):
    """The interface of one layer's KV cache, a pytree, which `attention/cache.py` implements."""

    def attend(
        self,
        implementation: Attend,
        q: Float[Array, "B T N H"],
        *,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        own: Mask,
        past: Mask | None,
        scale: Scale,
        index: PyTree,
    ) -> tuple[Float[Array, "B T N H"], Self]:
        """Attend to this pass's keys and the cached ones, and write this pass's into the cache.

        Returns the attention's output o, and the cache with both keys and values. It is called once
        in a pass, within the layer's compiled program, to which this layer's arrays are donated.

        implementation: a function of `attention.IMPLEMENTATIONS`. With `return_lse=True` it also
            returns the log-sum-exp of scores, by which `attention.ring.merge` joins two results.
        q: the queries, after RoPE.
        k, v: the keys, after RoPE, and values of this pass; not yet in the cache.
        own: the mask over this pass's keys, with this layer's window.
        past, index: the results of `KVCache.context`; the mask has this layer's window.
        scale: float32, the factor on each query's scores.
        """
        ...


class KVCache(Protocol):
    """The interface of a whole model's KV cache, a pytree that is never changed in place."""

    @property
    def layers(self) -> tuple[KVCacheLayer, ...]:
        """The cache of each layer, in order. A few at a time go to a compiled program."""
        ...

    def context(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Mask | None, PyTree]:
        """Return the mask of this pass's queries over cached keys, and where the layers write.

        It is called once in a pass, before any layer runs; all layers share the results.

        positions, segments: int32 [B, T], of the queries; segment 0 is padding.

        The mask has the window 0, in place of which each layer puts its own; it is None while
        nothing is cached, which must be known at compile time, and for a cache whose layers make
        masks of their own. What the layers need to know to
        write, as a pytree of arrays, is theirs alone to read.
        """
        ...

    def advanced(self, layers: tuple[PyTree, ...], length: int) -> Self:
        """Return the cache after a pass. It is called once, after all layers have run.

        layers: what `attend` of each layer returned, in order, of the type in `layers`.
        length: T, the number of tokens that the pass wrote in each sequence, padding included.
        """
        ...


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
    index: PyTree
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
        return Context(
            rotary=rotary,
            own=own,
            past=past,
            index=index,
            dropout=dropout,
            implementation=attend,
        )

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
        scale: Scale,
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
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    frequencies: Float[Array, "B pairs"],
    scheme: rope.Rope,
) -> tuple[rope.Rotary, Mask]:
    own = Mask(positions, positions, segments, segments, jnp.int32(0))  # in_layer sets the window
    return rope.rotary(scheme, positions, frequencies=frequencies), own
