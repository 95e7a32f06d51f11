"""The KV cache: keys and values of earlier passes, in the compute dtype or in int8.

Each layer has leaves of its own, [B, K, S, H], so that a decode step reads them in place. All rows
share one write index and end there; `start` is the index at which a row began, so left padding, and
a row that joins late, need no scatter. The slots form a ring: token i lies in slot i mod S.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from qwen_jax.attention import registry, ring
from qwen_jax.attention.reference import Attend
from qwen_jax.config import Config
from qwen_jax.kernels import choice
from qwen_jax.kernels.mask import Mask
from qwen_jax.leaves.int8 import Int8, quantize
from qwen_jax.meshes import sharding

DTYPES = ("int8", "int8_asymmetric")
_PIECE = 2048  # slots that a long pass attends to, and so copies or dequantises, at a time


@struct.dataclass
class LayerCache:
    """The KV cache of one layer: rotated keys and values, [B, K, S, H] each, as arrays or Int8."""

    k: Any
    v: Any

    def extend(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], index: Int[Array, ""]
    ) -> "LayerCache":
        """Write k, v [B, T, K, H] from slot `index` on. T must not run over the end of the ring."""
        return LayerCache(_put(self.k, k, index=index), _put(self.v, v, index=index))

    def read(self) -> tuple[Any, Any]:
        """Return k, v as [B, S, K, H], the order that attention takes."""
        return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (self.k, self.v))

    def piece(self, first: jax.Array, length: int) -> "LayerCache":
        """Return `length` slots from slot `first` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, 2), self)

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
        index: Int[Array, ""],
    ) -> tuple[jax.Array, "LayerCache"]:
        """Attend to this pass's keys and the cached ones. Returns o [B, T, N, H] and the new cache.

        q: [B, T, N, H].
        k, v: [B, T, K, H]. They are used unrounded, not read back from a quantised cache.
        own: a mask over this pass's keys.
        past, index: the results of `Cache.context`.
        """
        decode = registry.decoder(implementation, q, keys=self.k)
        rows = jax.typeof(q).sharding.spec
        leaves = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, self)

        @jax.shard_map(out_specs=(rows, leaves), check_vma=False)
        def local(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            own: Mask,
            past: Mask | None,
            scale: jax.Array,
            layer: LayerCache,
            index: jax.Array,
        ) -> tuple[jax.Array, LayerCache]:
            layer = layer.laid_out()
            if past is None:
                o = implementation(q, k, v, own, scale)
            elif decode is not None:
                start = index - own.q_positions[:, 0]
                held = (x if isinstance(x, Int8) else x.astype(q.dtype) for x in (layer.k, layer.v))
                o = decode(q, k, v, *held, start, index, own.window, scale)
            else:
                found = implementation(q, k, v, own, scale, return_lse=True)
                found = _merge_cached(
                    found, implementation, q=q, layer=layer, past=past, scale=scale, index=index
                )
                o = found[0].astype(q.dtype)
            # This is 0, but the compiler cannot know, so the write waits for the read and needs no
            # copy of the leaf. Otherwise XLA keeps a copy for every layer and step.
            after_reading = (jnp.max(jnp.abs(o)) < 0).astype(jnp.int32)
            return o, layer.extend(k, v, index + after_reading).laid_out()

        return local(q, k, v, own, past, scale, self, index)

    def laid_out(self) -> "LayerCache":
        """Return the same cache, with its memory in the order of its axes, as programs take it.

        A compiler otherwise chooses another order for a loop or a program, and copies every leaf
        into it and back.
        """

        def ordered(x: jax.Array) -> jax.Array:
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        return jax.tree.map(ordered, self)


@struct.dataclass
class Cache:
    """The KV cache of a whole model.

    layers: a `LayerCache` for each layer.
    start: int32 [B], the index of each row's first token.
    index: int32 [], the number of tokens written so far, padding included.
    fresh: True while nothing is written, known at compile time.
    """

    layers: tuple[LayerCache, ...]
    start: jax.Array
    index: jax.Array
    fresh: bool = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """The number of slots, S."""
        return jax.tree.leaves(self.layers)[0].shape[2]

    def context(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Mask | None, jax.Array | None]:
        """Return the mask of cached slots (None while nothing is written), and the write index."""
        past = None if self.fresh else self.past_mask(positions, segments)
        return past, self.index

    def past_mask(self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Mask:
        """Return the mask by which queries at these positions see the slots that are written."""
        return _past_mask(
            self.start, self.index, positions=positions, segments=segments, capacity=self.capacity
        )

    def advanced(self, layers: tuple[LayerCache, ...], length: int) -> "Cache":
        """Return the cache with these layers after `length` more tokens."""
        return Cache(layers, self.start, self.index + length, fresh=False)


@functools.partial(jax.jit, static_argnames="capacity")
def _past_mask(
    start: jax.Array, index: jax.Array, *, positions: jax.Array, segments: jax.Array, capacity: int
) -> Mask:
    slots = jnp.arange(capacity, dtype=jnp.int32)
    token = (slots - start[:, None]) % capacity  # position of the token in a slot
    written = (token < index - start[:, None]).astype(jnp.int32)
    return Mask(positions, token, segments, written, jnp.int32(0))


def empty(
    config: Config, start: Int[Array, " B"], *, capacity: int, dtype: Any, kind: str | None
) -> Cache:
    """Make an empty cache of `capacity` slots for rows that begin at `start`, int32 [B].

    kind: None (arrays of `held_dtype(dtype)`), "int8" (symmetric) or "int8_asymmetric".

    Raises ValueError for another kind.
    """
    if kind is not None and kind not in DTYPES:
        raise ValueError(f"cache_dtype {kind!r}: allowed are {', '.join(DTYPES)} or None")
    heads = sharding.held_heads(config.num_kv_heads)
    shape = start.shape[0], heads, capacity, config.head_dim
    layers, index = _zeros(config.num_layers, shape, held_dtype(dtype), kind)
    return Cache(layers, start, index, fresh=True)


def held_dtype(dtype: Any) -> Any:
    """Return the dtype that stores float keys and values of `dtype`: always float32 on a CPU.

    XLA's CPU backend rewrites a whole bfloat16 or float16 array at every write, and converts it to
    float32 at every product. Values are rounded to `dtype` before they are written.
    """
    return jnp.dtype(jnp.float32 if choice.device().platform == "cpu" else dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(
    num_layers: int, shape: tuple[int, ...], dtype: Any, kind: str | None
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """Make layers of zeros [B, K, S, H] and an index of 0, in one program for all leaves."""

    def zeros(letters: str, dtype: Any) -> jax.Array:
        return jnp.zeros(shape[: len(letters)], dtype, out_sharding=sharding.spec(letters))

    def leaf() -> Any:
        if kind is None:
            return zeros("BKSH", dtype)
        zero = zeros("BKS", jnp.float32) if kind == "int8_asymmetric" else None
        return Int8(zeros("BKSH", jnp.int8), zeros("BKS", jnp.float32), zero)

    return tuple(LayerCache(leaf(), leaf()) for _ in range(num_layers)), jnp.int32(0)


def _merge_cached(
    found: tuple[jax.Array, jax.Array],
    implementation: Attend,
    *,
    q: jax.Array,
    layer: LayerCache,
    past: Mask,
    scale: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attend to a layer's cached keys and merge that into `found`: float32 o and its log-sum-exp.

    Many queries go through a long cache in pieces, up to its last written slot, and merge the
    results, so that scores, and copies or dequantised keys, do not grow with the cache. The loop
    starts from `found`, because XLA would make zeros once for all layers and keep a copy per layer
    from the start of the program.
    """
    slots = past.k_positions.shape[1]
    if slots <= _PIECE or q.shape[1] <= registry.FEW:
        return ring.merge([found, implementation(q, *layer.read(), past, scale, return_lse=True)])

    def fold(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(i * _PIECE, slots - _PIECE)
        positions, segments = (
            jax.lax.dynamic_slice_in_dim(x, first, _PIECE, 1)
            for x in (past.k_positions, past.k_segments)
        )
        again = first + jnp.arange(_PIECE) < i * _PIECE  # the last piece may overlap the one before
        segments = jnp.where(again, 0, segments)
        mask = dataclasses.replace(past, k_positions=positions, k_segments=segments)
        keys = layer.piece(first, _PIECE).laid_out().read()
        return ring.merge([found, implementation(q, *keys, mask, scale, return_lse=True)])

    pieces = -(-jnp.minimum(index, slots) // _PIECE)
    return jax.lax.fori_loop(0, pieces, fold, found)


def _put(leaf: Any, new: jax.Array, *, index: jax.Array) -> Any:
    """Write new keys or values [B, T, K, H] into a leaf [B, K, S, H] at `index` modulo S, quantised
    as the leaf is.
    """
    new = jnp.swapaxes(new, 1, 2)  # [B, K, T, H]
    written = quantize(new, leaf.zero is None) if isinstance(leaf, Int8) else new
    slot = index % jax.tree.leaves(leaf)[0].shape[2]

    def write(buffer: jax.Array, part: jax.Array) -> jax.Array:
        where = (0, 0, slot, 0)[: buffer.ndim]
        return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), where)

    return jax.tree.map(write, leaf, written)
