"""The decoder: the mathematics of Qwen, from token ids to logits.

Axis letters, used in every equation, partitioning, table and error message:

    B batch   T query tokens   S key tokens   D model width   L layers   V vocabulary
    N query heads   K key/value heads   G queries per KV head   H head dim   F feed-forward width
    Q = N H and U = K H, the widths of queries and of keys

A `Decoder` is an immutable pytree of named weights. A pass goes

    token ids -> embed -> L blocks {norm, attention, norm, feed-forward} -> norm -> logits

and this file holds nothing else. What it leaves to others:

    rope.py               the angles of RoPE and the scale of a query, by scheme
    vocabulary.py         the look-up in, and probabilities over, a vocabulary split over devices
    running.py            the blocks one after the other: scanned, or a few in a compiled program
    build.py              decoders made, stacked, and taken apart
    leaves/weights.py     how a weight of whatever kind (float, int8, LoRA) is drawn and multiplied
    attention/            the functions `attend`, masks, and the KV cache
    meshes/moves.py       how arrays get onto the device that needs them
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from qwen_jax import attention
from qwen_jax.attention import Mask
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Maker, Weight, contract
from qwen_jax.meshes import moves, sharding
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import rope, running, vocabulary
from qwen_jax.model.running import Context, Groups, KVCache, LayerCache


def rms_norm(x: jax.Array, weight: Any, *, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, then times the weight: the original's order."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return _in_float32(jnp.multiply, wide.astype(x.dtype), weight=weight)


def _in_float32(operation: Callable[..., jax.Array], x: jax.Array, *, weight: Any) -> jax.Array:
    """x * weight or x + weight, of x's dtype. In float32 the result is rounded as it would be in
    bfloat16 or float16, and the weight's gradient adds up over tokens in float32.
    """
    wide = operation(x.astype(jnp.float32), weight[...].astype(jnp.float32))
    return wide.astype(x.dtype)


class Attention(nnx.Module):
    """Softmax attention over grouped heads: o(attend(rotate(q(x)), rotate(k(x)), v(x)))."""

    def __init__(self, config: Config, make: Maker):
        self.config = config
        std = config.initializer_range
        self.q = make.normal("QD", std)
        self.k = make.normal("UD", std)
        self.v = make.normal("UD", std)
        self.o = make.normal("DQ", std / math.sqrt(2 * config.num_layers))
        if config.qkv_bias:
            self.q_bias = make.full("Q", 0)
            self.k_bias = make.full("U", 0)
            self.v_bias = make.full("U", 0)
        if config.qk_norm:
            self.q_norm = make.full("H", 1)
            self.k_norm = make.full("H", 1)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        layer: LayerCache | None,
        attend: Callable[..., Any],
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] after the norm -> the same shape, and the layer's cache with these keys.

        layer: None without a cache. attend: an implementation out of `attention.IMPLEMENTATIONS`.
        """
        residual = jax.typeof(x).sharding.spec
        heads = self.config.num_kv_heads
        columns = moves.to_columns(x)
        keys = columns if sharding.held_heads(heads) == heads else moves.to_columns(x, split=False)
        q = contract("BTD,QD->BTQ", columns, weight=self.q)
        k = contract("BTD,UD->BTU", keys, weight=self.k)
        v = contract("BTD,UD->BTU", keys, weight=self.v)
        if self.config.qkv_bias:
            q = _in_float32(jnp.add, q, weight=self.q_bias)
            k = _in_float32(jnp.add, k, weight=self.k_bias)
            v = _in_float32(jnp.add, v, weight=self.v_bias)
        q, k, v = (self._by_head(each) for each in (q, k, v))
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm, eps=self.config.norm_eps)
            k = rms_norm(k, self.k_norm, eps=self.config.norm_eps)
        q, k = context.rotary.rotate(q), context.rotary.rotate(k)
        k, v = moves.spread_heads(k), moves.spread_heads(v)
        scale = context.rotary.query_scale * self.config.head_dim**-0.5
        if layer is None:
            o = attention.on_shards(attend)(q, k, v, context.own, scale)
        else:
            o, layer = layer.attend(
                attend, q, k=k, v=v, own=context.own, past=context.past, scale=scale,
                index=context.index,
            )  # fmt: skip
        o = jnp.reshape(o, (*o.shape[:2], -1), out_sharding=P(*jax.typeof(o).sharding.spec[:3]))
        return contract("BTQ,DQ->BTD", o, weight=self.o, out=residual), layer

    def _by_head(self, x: jax.Array) -> jax.Array:
        """[B, T, Q] -> [B, T, N, H], and so keys."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        return jnp.reshape(x, shape, out_sharding=P(*jax.typeof(x).sharding.spec, None))


class FeedForward(nnx.Module):
    """SwiGLU: down(up(x) * silu(gate(x))). In a Qwen checkpoint the gate is w2, up is w1."""

    def __init__(self, config: Config, make: Maker):
        std = config.initializer_range
        self.gate = make.normal("FD", std)
        self.up = make.normal("FD", std)
        self.down = make.normal("DF", std / math.sqrt(2 * config.num_layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] after the norm -> the same shape."""
        residual = jax.typeof(x).sharding.spec
        x = moves.to_columns(x)
        gate = contract("BTD,FD->BTF", x, weight=self.gate)
        up = contract("BTD,FD->BTF", x, weight=self.up)
        return contract("BTF,DF->BTD", up * jax.nn.silu(gate), weight=self.down, out=residual)


class Block(nnx.Module):
    """One layer: attention, then a feed-forward network, each of a norm of what it is added to."""

    def __init__(self, config: Config, make: Maker):
        self.norm_eps = config.norm_eps
        self.attn_norm = make.full("D", 1)
        self.attn = Attention(config, make)
        self.ffn_norm = make.full("D", 1)
        self.ffn = FeedForward(config, make)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        layer: LayerCache | None,
        attend: Callable[..., Any],
    ) -> tuple[jax.Array, LayerCache | None]:
        """The residual x [B, T, D] -> the same after this layer, and the layer's cache."""
        dropout = context.dropout
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attn_norm, eps=self.norm_eps)
            o, layer = self.attn(normed, context, layer=layer, attend=attend)
            x = x + (o if dropout is None else dropout.of_attention(o))
        with jax.named_scope("feed_forward"):
            x, ffn = moves.settled((x, self.ffn))
            o = ffn(rms_norm(x, self.ffn_norm, eps=self.norm_eps))
            x = x + (o if dropout is None else dropout.of_feed_forward(o))
        return x, layer


@struct.dataclass
class Output:
    """The result of a pass.

    last [B, T, D]: after the final norm, what `Decoder.logits` takes. cache: None without one.
    hidden_states, where asked for: [B, T, D] each, first the embeddings, then the residual after
    every block, of which the last one is replaced by `last`; else empty.
    """

    last: jax.Array
    cache: Any
    hidden_states: tuple[jax.Array, ...]


class Decoder(nnx.Module):
    """The weights of a model, and a pass through them.

    embedding [V, D]. layers: L separate blocks (for decoding and conversion); or one Block whose
    leaves are stacked on a first axis L (for training); or `Groups` of separate blocks. final_norm
    [D]. head [V, D], or None where the embedding is the head, too.
    """

    def __init__(
        self,
        config: Config,
        embedding: Weight,
        *,
        layers: Any,
        final_norm: Weight,
        head: Weight | None,
    ):
        self.config = config
        self.embedding = embedding
        self.layers: Any = layers if isinstance(layers, Block | Groups) else nnx.List(layers)
        self.final_norm = final_norm
        self.head = head

    def replace(self, **changes: Any) -> "Decoder":
        """The same decoder with other parts, by the names of the constructor's arguments."""
        parts = {
            "config": self.config,
            "embedding": self.embedding,
            "layers": self.layers,
            "final_norm": self.final_norm,
            "head": self.head,
        }
        return Decoder(**(parts | changes))

    def grouped(self) -> "Decoder":
        """The same decoder, of separate blocks, made ready for many passes outside `jit`."""
        return self.replace(layers=Groups(running.groups(self.layers)))

    def embed(self, tokens: jax.Array, dtype: Any = None) -> jax.Array:
        """int [B, T] -> [B, T, D] of `dtype` (None: the weights'), in which the blocks compute."""
        return _embed(self.embedding, tokens, dtype=dtype or self.embedding.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, D] after the final norm -> float32 [B, T, V]."""
        return logits(x, self.output)

    @property
    def output(self) -> Weight:
        """The head, [V, D]."""
        return self.embedding if self.head is None else self.head

    @property
    def windows(self) -> np.ndarray:
        """How many tokens each layer sees, int32 [L]."""
        widths = self.config.layer_windows or [None] * self.config.num_layers
        return np.array([width or attention.FULL for width in widths], np.int32)

    def context(
        self,
        positions: jax.Array,
        segments: jax.Array,
        *,
        frequencies: jax.Array,
        cache: KVCache | None,
        dropout: Dropout | None = None,
    ) -> Context:
        """What the blocks share in a pass; arguments as those of a call."""
        scheme = rope.from_config(self.config)
        rotary, own = _rotary_and_mask(positions, segments, frequencies=frequencies, scheme=scheme)
        past, index = (None, None) if cache is None else cache.context(positions, segments)
        return Context(rotary, own, past, index, dropout)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        *,
        segments: jax.Array,
        frequencies: jax.Array,
        cache: KVCache | None = None,
        attend: Callable[..., Any] = attention.xla,
        remat: Callable[..., Any] | None = None,
        hidden_states: bool = False,
        dropout: Dropout | None = None,
    ) -> Output:
        """One pass over x [B, T, D], embeddings of tokens at `positions`, int32 [B, T].

        segments int32 [B, T]: 0 is padding, and tokens see their own segment only. frequencies
        float32 [B, H/2]: of `rope.Rope.frequencies`. attend: out of `attention.IMPLEMENTATIONS`.
        remat: a policy of `jax.checkpoint_policies`, applied to each block. hidden_states: keep the
        residual after each block. dropout: in the blocks. A stacked decoder is scanned and keeps no
        cache. Outside `jit` the blocks run a few at a time through one compiled program, and the
        cache passed in is donated.
        """
        context = self.context(
            positions, segments, frequencies=frequencies, cache=cache, dropout=dropout
        )
        settings: Any = {"attend": attend, "remat": remat, "hidden_states": hidden_states}
        if isinstance(self.layers, Block):
            if cache is not None:
                raise ValueError("a stacked decoder keeps no cache: unstack it first")
            after = running.scan(x, self.layers, windows=self.windows, context=context, **settings)
        else:
            after, cache = running.in_groups(
                x, self.layers, windows=self.windows, context=context, cache=cache, **settings
            )
        last = _final_norm(after[-1], self.final_norm, eps=self.config.norm_eps)
        return Output(last, cache, (x, *after[:-1], last) if hidden_states else ())


@functools.partial(jax.jit, static_argnames="scheme")
def _rotary_and_mask(
    positions: jax.Array, segments: jax.Array, *, frequencies: jax.Array, scheme: rope.Rope
) -> tuple[rope.Rotary, Mask]:
    own = Mask(positions, positions, segments, segments, jnp.int32(0))
    return rope.rotary(scheme, positions, frequencies=frequencies), own


@functools.partial(jax.jit, static_argnames="dtype")
def _embed(table: Weight, tokens: jax.Array, *, dtype: Any) -> jax.Array:
    return vocabulary.look_up(table[...], tokens, dtype=dtype)


@functools.partial(jax.jit, static_argnames="eps")
def _final_norm(x: jax.Array, weight: Weight, *, eps: float) -> jax.Array:
    return rms_norm(x, moves.unshard(weight, x.dtype), eps=eps)


@jax.jit
def logits(x: jax.Array, head: Weight) -> jax.Array:
    """[B, T, D] after the final norm and a head [V, D] -> float32 [B, T, V]."""
    head = moves.unshard(head, x.dtype)
    return contract("BTD,VD->BTV", x, weight=head, preferred_element_type=jnp.float32)
