"""The KV cache: keys and values of earlier passes, in the compute dtype or in int8.

Each layer has arrays of its own, [B, K, S, H], so that a decode step reads them in place. All
sequences of a batch share one write index, at which all of them end. `start` is the write index at
which a sequence began, so left padding, and a sequence that joins late, need no scatter. The S
slots form a ring: the token written at index i lies in slot i mod S.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.attention import registry, ring
from qwen_jax.attention.reference import Attend
from qwen_jax.attention.registry import Implementation
from qwen_jax.config import Config
from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import CacheLeaf, KeysOrValues, Quantised, Scale
from qwen_jax.kernels.mask import Mask
from qwen_jax.leaves.int8 import Int8, quantize
from qwen_jax.meshes import sharding

DTYPES = ("int8", "int8_asymmetric")
_PIECE = 2048  # slots that a long pass attends to, and so copies or dequantises, at a time


@struct.dataclass
class LayerCache:
    """The KV cache of one layer.

    k, v: [B, K, S, H] each, keys after RoPE and values, as arrays or `Int8`.
    """

    k: CacheLeaf
    v: CacheLeaf

    def extend(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, index: Int[Array, ""]
    ) -> "LayerCache":
        """Return the cache with k, v [B, T, K, H] written into its slots from `index` mod S on.

        The T slots must not run over the end of the ring.
        """
        return LayerCache(_put(self.k, k, index=index), _put(self.v, v, index=index))

    def read(self) -> tuple[KeysOrValues, KeysOrValues]:
        """Return the cached keys and values as [B, S, K, H], the order that attention takes."""
        return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (self.k, self.v))

    def piece(self, first: jax.Array, length: int) -> "LayerCache":
        """Return the part of the cache with `length` slots from slot `first` on."""
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
        scale: Scale,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N H"], "LayerCache"]:
        """Attend to this pass's keys and the cached ones. Returns o [B, T, N, H] and the new cache.

        implementation: an attention function, from `registry.get` or `prove.resolve`.
        q: [B, T, N, H].
        k, v: [B, T, K, H], of this pass. They are used unrounded, not read back from a quantised
            cache.
        own: the mask over this pass's keys.
        past: the mask over the cached keys; None while nothing is written.
        scale: float32 [B, T], the factor on each query's scores.
        index: int32 [], the write index. `Cache.context` returns `past` and `index`.
        """
        decode = Implementation.of(implementation).decode_kernel(q, keys=self.k)
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
                keys, values = (
                    x if isinstance(x, Quantised) else x.astype(q.dtype) for x in (layer.k, layer.v)
                )
                o = decode(q, k, v, keys, values, start, index, own.window, scale)
            else:
                found = implementation(q, k, v, own, scale, return_lse=True)
                found = _merge_cached(
                    found, implementation, q=q, layer=layer, past=past, scale=scale, index=index
                )
                o = found[0].astype(q.dtype)
            # This is 0, but the compiler cannot know, so the write waits for the read and needs no
            # copy of the leaf. Otherwise XLA keeps a copy for every layer and step.
            after_reading = (jnp.max(jnp.abs(o)) < 0).astype(jnp.int32)
            return o, layer.extend(k, v, index=index + after_reading).laid_out()

        return local(q, k, v, own, past, scale, self, index)

    def laid_out(self) -> "LayerCache":
        """Return the same cache with its arrays' memory in the order of their axes.

        Programs take their arguments in this order. XLA otherwise chooses another order for a loop
        or a program, and copies every array into it and back.
        """

        def ordered(x: jax.Array) -> jax.Array:
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        return jax.tree.map(ordered, self)


@struct.dataclass
class Cache:
    """The KV cache of a whole model.

    layers: the cache of each layer.
    start: int32 [B], the write index of each sequence's first token.
    index: int32 [], the write index: the number of tokens written so far, padding included.
    fresh: whether nothing is written yet, known at compile time.
    """

    layers: tuple[LayerCache, ...]
    start: Int[Array, " B"]
    index: Int[Array, ""]
    fresh: bool = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """The number of slots S of the ring."""
        return jax.tree.leaves(self.layers)[0].shape[2]

    def context(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Mask | None, Int[Array, ""]]:
        """Return the mask of this pass's queries over the cached keys, and the write index.

        positions, segments: int32 [B, T], of the queries.

        The mask is None while nothing is written.
        """
        past = None if self.fresh else self.past_mask(positions, segments)
        return past, self.index

    def past_mask(self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Mask:
        """Return the mask of this pass's queries over the keys in slots that are written.

        positions, segments: int32 [B, T], of the queries.

        The mask's window is 0; each layer replaces it by its own.
        """
        return _past_mask(
            self.start, self.index, positions=positions, segments=segments, capacity=self.capacity
        )

    def advanced(self, layers: tuple[LayerCache, ...], length: int) -> "Cache":
        """Return the cache after a pass of `length` tokens, given the layers that hold them."""
        return Cache(layers, self.start, self.index + length, fresh=False)


@functools.partial(jax.jit, static_argnames="capacity")
def _past_mask(
    start: jax.Array, index: jax.Array, *, positions: jax.Array, segments: jax.Array, capacity: int
) -> Mask:
    """Compute `Cache.past_mask` in one program."""
    slots = jnp.arange(capacity, dtype=jnp.int32)
    token = (slots - start[:, None]) % capacity  # position of the token in a slot
    written = (token < index - start[:, None]).astype(jnp.int32)
    return Mask(positions, token, segments, written, jnp.int32(0))


def empty(
    config: Config, start: Int[Array, " B"], *, capacity: int, dtype: DTypeLike, kind: str | None
) -> Cache:
    """Make an empty KV cache for a batch of sequences.

    start: int32 [B], the write index at which each sequence begins.
    capacity: the number of slots S.
    dtype: the dtype of computed keys and values.
    kind: None to store them as floats (in `held_dtype(dtype)`), "int8" (symmetric) or
        "int8_asymmetric".

    Raises ValueError for another kind.
    """
    if kind is not None and kind not in DTYPES:
        raise ValueError(f"cache_dtype {kind!r}: allowed are {', '.join(DTYPES)} or None")
    heads = sharding.held_heads(config.num_kv_heads)
    shape = start.shape[0], heads, capacity, config.head_dim
    layers, index = _zeros(config.num_layers, shape, held_dtype(dtype), kind)
    return Cache(layers, start, index, fresh=True)


def held_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype in which a cache stores floats of `dtype`: float32 on a CPU, else `dtype`.

    XLA's CPU backend rewrites a whole bfloat16 or float16 array at every write, and converts it to
    float32 at every product. Values are rounded to `dtype` before they are written.
    """
    return jnp.dtype(jnp.float32 if choice.device().platform == "cpu" else dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(
    num_layers: int, shape: tuple[int, ...], dtype: DTypeLike, kind: str | None
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """Make the layers of an empty cache and a write index of 0, in one program for all arrays.

    shape: (B, K, S, H).
    dtype: the dtype of an array that is not quantised.
    kind: None, "int8" or "int8_asymmetric".
    """

    def zeros(letters: str, dtype: DTypeLike) -> jax.Array:
        return jnp.zeros(shape[: len(letters)], dtype, out_sharding=sharding.spec(letters))

    def leaf() -> CacheLeaf:
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
    """Attend to a layer's cached keys, and merge the output into `found`.

    found: the attention to this pass's own keys, float32 o [B, T, N, H] and log-sum-exp [B, T, N].
    past: the mask over the cached keys.
    index: int32 [], the write index.

    Returns o and the log-sum-exp over both, in the same form.

    Many queries go through a long cache in pieces, up to its last written slot, and merge the
    results, so that scores, and copied or dequantised keys, do not grow with the cache. The loop
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


def _put(leaf: CacheLeaf, new: jax.Array, *, index: jax.Array) -> CacheLeaf:
    """Return a cache leaf with new keys or values written from slot `index` mod S on.

    leaf: [B, K, S, H], an array or `Int8`.
    new: [B, T, K, H], floats, which are quantised as the leaf is.
    """
    new = jnp.swapaxes(new, 1, 2)  # [B, K, T, H]
    written = quantize(new, leaf.zero is None) if isinstance(leaf, Quantised) else new
    slot = index % jax.tree.leaves(leaf)[0].shape[2]

    def write(buffer: jax.Array, part: jax.Array) -> jax.Array:
        first = np.int32(0)  # as the slot is: with jax_enable_x64 a Python 0 would be an int64
        where = (first, first, slot, first)[: buffer.ndim]
        return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), where)

    return jax.tree.map(write, leaf, written)
