"""The KV cache: keys and values of earlier passes, in the compute dtype or in int8.

Layers are separate leaves [B, K, S, H], so that a decode step reads each where it lies. All rows
share one write index and end there; `start` says at which index a row began, so left padding, and a
row that joins late, need no scatter. The slots are a ring: token i lies in slot i mod S.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from qwen_jax.attention import registry, ring
from qwen_jax.attention.mask import Mask
from qwen_jax.config import Config
from qwen_jax.kernels import choice
from qwen_jax.leaves.int8 import Int8, quantize
from qwen_jax.meshes import sharding

DTYPES = ("int8", "int8_asymmetric")
_PIECE = 2048  # slots that a long pass attends to at a time, and so copies or dequantises at most


@struct.dataclass
class LayerCache:
    """Keys (after RoPE) and values of one layer, [B, K, S, H] each: arrays or Int8."""

    k: Any
    v: Any

    def extend(self, k: jax.Array, v: jax.Array, index: jax.Array) -> "LayerCache":
        """Write k, v [B, T, K, H] at `index`; a pass must not run over the end of the ring."""
        return LayerCache(_put(self.k, k, index), _put(self.v, v, index))

    def read(self) -> tuple[Any, Any]:
        """k, v [B, S, K, H], as attention takes them."""
        return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (self.k, self.v))

    def piece(self, first: jax.Array, length: int) -> "LayerCache":
        """The slots from `first` on, so many."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, 2), self)

    def attend(
        self,
        implementation: Callable[..., Any],
        q: jax.Array,
        *,
        k: jax.Array,
        v: jax.Array,
        own: Mask,
        past: Mask | None,
        scale: jax.Array,
        index: jax.Array,
    ) -> tuple[jax.Array, "LayerCache"]:
        """Attention over this pass's k, v and the earlier ones held here; and the layer with both.

        q [B, T, N, H]; k, v [B, T, K, H]; own: a mask over this pass's keys. past, index: what
        `Cache.context` has returned. The pass's own keys are not read back from the cache, where
        they may be quantised.
        """
        decode = registry.decoder(implementation, q, self.k)
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
                found = _merge_cached(found, implementation, q, layer, past, scale, index)
                o = found[0].astype(q.dtype)
            # Zero, but the compiler cannot know: the write waits for the read, so it needs no copy
            # of the leaf. XLA otherwise keeps one for every layer and step.
            after_reading = (jnp.max(jnp.abs(o)) < 0).astype(jnp.int32)
            return o, layer.extend(k, v, index + after_reading).laid_out()

        return local(q, k, v, own, past, scale, self, index)

    def laid_out(self) -> "LayerCache":
        """The same, in the order of memory in which every program is handed it: that of its axes.

        A compiler otherwise chooses another order for a loop, or for one program, and copies every
        leaf into it and back again.
        """

        def ordered(x: jax.Array) -> jax.Array:
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        return jax.tree.map(ordered, self)


@struct.dataclass
class Cache:
    """layers: one `Layer` each; start int32 [B]: the index of a row's first token; index int32 []:
    tokens written so far, padding included. fresh: nothing is written yet (known to the compiler).
    """

    layers: tuple[LayerCache, ...]
    start: jax.Array
    index: jax.Array
    fresh: bool = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.layers)[0].shape[2]

    def context(
        self, positions: jax.Array, segments: jax.Array
    ) -> tuple[Mask | None, jax.Array | None]:
        """Which slots queries at these positions see, None while nothing is written; and what the
        layers need to know to write, here the index.
        """
        past = None if self.fresh else self.past_mask(positions, segments)
        return past, self.index

    def past_mask(self, positions: jax.Array, segments: jax.Array) -> Mask:
        """Which slots queries at these positions see: those that earlier passes have written."""
        return _past_mask(self.start, self.index, positions, segments, self.capacity)

    def advanced(self, layers: tuple[LayerCache, ...], length: int) -> "Cache":
        return Cache(layers, self.start, self.index + length, fresh=False)


@functools.partial(jax.jit, static_argnames="capacity")
def _past_mask(
    start: jax.Array, index: jax.Array, positions: jax.Array, segments: jax.Array, capacity: int
) -> Mask:
    slots = jnp.arange(capacity, dtype=jnp.int32)
    token = (slots - start[:, None]) % capacity  # position of the token in a slot
    written = (token < index - start[:, None]).astype(jnp.int32)
    return Mask(positions, token, segments, written, jnp.int32(0))


def empty(config: Config, start: jax.Array, capacity: int, dtype: Any, kind: str | None) -> Cache:
    """An empty cache of `capacity` slots for the rows that begin at `start`, int32 [B].

    kind: None (arrays of `held_dtype(dtype)`), "int8" (symmetric) or "int8_asymmetric".
    """
    if kind is not None and kind not in DTYPES:
        raise ValueError(f"cache_dtype {kind!r}: allowed are {', '.join(DTYPES)} or None")
    heads = sharding.held_heads(config.num_kv_heads)
    shape = start.shape[0], heads, capacity, config.head_dim
    layers, index = _zeros(config.num_layers, shape, held_dtype(dtype), kind)
    return Cache(layers, start, index, fresh=True)


def held_dtype(dtype: Any) -> Any:
    """The dtype in which float keys and values of `dtype` are held: on a CPU always float32.

    XLA's CPU backend rewrites the whole of a bfloat16 or float16 array at every write, and turns
    it into float32 whenever it is multiplied. What is written has been rounded to `dtype` before.
    """
    return jnp.dtype(jnp.float32 if choice.device().platform == "cpu" else dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(
    num_layers: int, shape: tuple[int, ...], dtype: Any, kind: str | None
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """Layers of zeros, of the shape [B, K, S, H], and an index of 0: one program for all leaves."""

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
    implementation: Callable[..., Any],
    q: jax.Array,
    layer: LayerCache,
    past: Mask,
    scale: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merge attention to a layer's keys of earlier passes into `found`: o in float32 and the
    log-sum-exp of its scores.

    Many queries go through a long cache in pieces, as far as it is written, and fold the results:
    scores, and what an implementation copies or dequantises, do not grow with the cache. The loop
    begins with what was found: zeros would be made once for all layers of a program, and be kept,
    with a copy for each layer, from its beginning.
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
        again = first + jnp.arange(_PIECE) < i * _PIECE  # where the last piece overlaps another
        segments = jnp.where(again, 0, segments)
        mask = dataclasses.replace(past, k_positions=positions, k_segments=segments)
        keys = layer.piece(first, _PIECE).laid_out().read()
        return ring.merge([found, implementation(q, *keys, mask, scale, return_lse=True)])

    pieces = -(-jnp.minimum(index, slots) // _PIECE)
    return jax.lax.fori_loop(0, pieces, fold, found)


def _put(leaf: Any, new: jax.Array, index: jax.Array) -> Any:
    new = jnp.swapaxes(new, 1, 2)  # [B, K, T, H]
    written = quantize(new, leaf.zero is None) if isinstance(leaf, Int8) else new
    slot = index % jax.tree.leaves(leaf)[0].shape[2]

    def write(buffer: jax.Array, part: jax.Array) -> jax.Array:
        where = (0, 0, slot, 0)[: buffer.ndim]
        return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), where)

    return jax.tree.map(write, leaf, written)
