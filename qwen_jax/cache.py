"""The KV cache: keys and values of earlier passes, in the compute dtype or in int8.

Layers are separate leaves [B, K, S, H], so that a decode step reads each where it lies. All rows
share one write index and end there; `start` says at which index a row began, so left padding, and a
row that joins late, need no scatter. The slots are a ring: token i lies in slot i mod S.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import attention, ring, sharding
from qwen_jax.attention import Mask
from qwen_jax.config import Config

DTYPES = ("int8", "int8_asymmetric")


@struct.dataclass
class Int8:
    """x = values * scale + zero, a scale (and zero) for each token and head.

    values int8 [..., H]; scale float32 [...]; zero float32 [...], or None where symmetric. No axis
    of length 1: a TPU would pad it to 128 lanes.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self, dtype: Any) -> jax.Array:
        x = self.values.astype(jnp.float32) * self.scale[..., None]
        return (x if self.zero is None else x + self.zero[..., None]).astype(dtype)


def quantize(x: jax.Array, symmetric: bool) -> Int8:
    """Round x [..., H] to 8 bits: +-127 over the largest magnitude, or 0..255 over the range."""
    x = x.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    if symmetric:
        scale = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True) / 127, tiny)
        return Int8(jnp.round(x / scale).astype(jnp.int8), scale[..., 0], None)
    low = jnp.min(x, -1, keepdims=True)
    scale = jnp.maximum((jnp.max(x, -1, keepdims=True) - low) / 255, tiny)
    values = jnp.clip(jnp.round((x - low) / scale) - 128, -128, 127)
    return Int8(values.astype(jnp.int8), scale[..., 0], (low + 128 * scale)[..., 0])


@struct.dataclass
class Layer:
    """Keys (after RoPE) and values of one layer, [B, K, S, H] each: arrays or Int8."""

    k: Any
    v: Any

    def extend(self, k: jax.Array, v: jax.Array, index: jax.Array) -> "Layer":
        """Write k, v [B, T, K, H] at `index`; a pass must not run over the end of the ring."""
        return Layer(_put(self.k, k, index), _put(self.v, v, index))

    def read(self) -> tuple[Any, Any]:
        """k, v [B, S, K, H], as attention takes them."""
        return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (self.k, self.v))


@struct.dataclass
class Cache:
    """layers: one `Layer` each; start int32 [B]: the index of a row's first token; index int32 []:
    tokens written so far, padding included. fresh: nothing is written yet (known to the compiler).
    """

    layers: tuple[Layer, ...]
    start: jax.Array
    index: jax.Array
    fresh: bool = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.layers)[0].shape[2]

    def past_mask(self, positions: jax.Array, segments: jax.Array) -> Mask:
        """Which slots queries at these positions see: those that earlier passes have written."""
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        token = (slots - self.start[:, None]) % self.capacity  # position of the token in a slot
        written = (token < self.index - self.start[:, None]).astype(jnp.int32)
        return Mask(positions, token, segments, written, jnp.int32(0))

    def advanced(self, layers: tuple[Layer, ...], length: int) -> "Cache":
        return Cache(layers, self.start, self.index + length, fresh=False)


def empty(config: Config, start: jax.Array, capacity: int, dtype: Any, kind: str | None) -> Cache:
    """An empty cache of `capacity` slots for the rows that begin at `start`, int32 [B].

    kind: None (arrays of `dtype`), "int8" (symmetric) or "int8_asymmetric".
    """
    if kind is not None and kind not in DTYPES:
        raise ValueError(f"cache_dtype {kind!r}: allowed are {', '.join(DTYPES)} or None")

    heads = sharding.held_heads(config.num_kv_heads)
    sizes = {"B": start.shape[0], "K": heads, "S": capacity, "H": config.head_dim}

    def zeros(letters: str, dtype: Any) -> jax.Array:
        shape = [sizes[letter] for letter in letters]
        return jnp.zeros(shape, dtype, out_sharding=sharding.spec(letters))

    def leaf() -> Any:
        if kind is None:
            return zeros("BKSH", dtype)
        zero = zeros("BKS", jnp.float32) if kind == "int8_asymmetric" else None
        return Int8(zeros("BKSH", jnp.int8), zeros("BKS", jnp.float32), zero)

    layers = tuple(Layer(leaf(), leaf()) for _ in range(config.num_layers))
    return Cache(layers, start, jnp.int32(0), fresh=True)


def attend(
    implementation: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own: Mask,
    past: Mask | None,
    scale: jax.Array,
    layer: Layer,
    index: jax.Array,
) -> tuple[jax.Array, Layer]:
    """Attention over this pass's k, v and the layer's earlier ones; and the layer with both.

    The pass's own keys are not read back from the cache, where they may be quantised. past: None
    for an empty cache.
    """
    decode = attention.decoder(implementation, q, layer.k)
    rows = jax.typeof(q).sharding.spec
    leaves = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, layer)

    @jax.shard_map(out_specs=(rows, leaves), check_vma=False)
    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        own: Mask,
        past: Mask | None,
        scale: jax.Array,
        layer: Layer,
        index: jax.Array,
    ) -> tuple[jax.Array, Layer]:
        if past is None:
            o = implementation(q, k, v, own, scale)
        elif decode is not None:
            start = index - own.q_positions[:, 0]
            o = decode(q, k, v, layer.k, layer.v, start, index, own.window, scale)
        else:
            parts = [implementation(q, k, v, own, scale, return_lse=True)]
            parts.append(implementation(q, *layer.read(), past, scale, return_lse=True))
            o = ring.merge(parts)[0].astype(q.dtype)
        # Zero, but the compiler cannot know: the write waits for the read, so it needs no copy of
        # the leaf. XLA otherwise keeps one for every layer and step.
        after_reading = (jnp.max(jnp.abs(o)) < 0).astype(jnp.int32)
        return o, layer.extend(k, v, index + after_reading)

    return local(q, k, v, own, past, scale, layer, index)


def _put(leaf: Any, new: jax.Array, index: jax.Array) -> Any:
    new = jnp.swapaxes(new, 1, 2)  # [B, K, T, H]
    written = quantize(new, leaf.zero is None) if isinstance(leaf, Int8) else new
    slot = index % jax.tree.leaves(leaf)[0].shape[2]

    def write(buffer: jax.Array, part: jax.Array) -> jax.Array:
        where = (0, 0, slot, 0)[: buffer.ndim]
        return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), where)

    return jax.tree.map(write, leaf, written)
