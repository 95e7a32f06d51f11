"""The decoder: the mathematics of a Qwen model, from token ids to logits.

These axis letters name the axes of arrays throughout the project:

    B batch   T query tokens   S key tokens   D model width   L layers   V vocabulary
    N query heads   K key/value heads   G queries per KV head   H head dim   F feed-forward width
    Q = N x H and U = K x H, the widths of queries and of keys; `Config.sizes` holds the lengths

A `Decoder` is a pytree of named weights, and never changes. Its three functions compute in turn

    embed:     token ids -> x
    __call__:  x -> L blocks {norm, attention, norm, feed-forward} -> norm -> last
    logits:    last -> logits

`running.py` gives each block its weights gathered over the FSDP axes and cast to x's dtype; they
are still split over `tp`. The calls of `moves` change how an array is split, and no values. Other
parts of the model lie elsewhere:

    rope.py               rotary position embedding: angles and query scales for each scheme
    norm.py               RMS norm; products with and sums of vectors of weights, in float32
    vocabulary.py         embedding look-up, logits and log-probabilities, over a split vocabulary
    context.py            what the blocks of a pass share; the interface of a KV cache
    running.py            runs the blocks, as one scan or in groups, and rematerialises them
    build.py              makes decoders, and stacks and unstacks their layers
    lora.py, adapted.py   put adapters on a decoder's weights, to train and to generate
    leaves/               the kinds of weights (float, int8, LoRA), and how each is multiplied by
    attention/            attention functions, masks, and the KV cache of `generate` (cache.py)
    meshes/               how arrays are split, by axis letter; how they are moved; dropout

To add a RoPE scheme, a kind of weight, a KV cache or experts, follow the steps in docs/design.md.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax import attention
from qwen_jax.attention import Attend
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Leaf, Maker, Weight, contract
from qwen_jax.meshes import moves
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import running, vocabulary
from qwen_jax.model.context import Context, KVCache, KVCacheLayer
from qwen_jax.model.norm import final_norm, in_float32, rms_norm
from qwen_jax.model.running import Groups

_Cache = TypeVar("_Cache", bound=KVCache)


class Attention(nnx.Module):
    """Softmax attention over grouped heads: o(attend(rotate(q(x)), rotate(k(x)), v(x))).

    Products for q, k and v may have biases; q and k may be normed by head before their rotation.
    """

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
        self, x: Float[Array, "B T D"], context: Context, *, cache: KVCacheLayer | None
    ) -> tuple[Float[Array, "B T D"], KVCacheLayer | None]:
        """Attend from x [B, T, D], already normed. Returns the same shape, and the new cache."""
        partitioning = jax.typeof(x).sharding.spec  # of the residual stream
        # They differ in their gradients alone, and only where `tp` does not divide K.
        x, x_kv = moves.to_heads(x, self.config.num_kv_heads)
        q = contract("BTD,QD->BTQ", x, weight=self.q)
        k = contract("BTD,UD->BTU", x_kv, weight=self.k)
        v = contract("BTD,UD->BTU", x_kv, weight=self.v)
        if self.config.qkv_bias:
            q = in_float32(jnp.add, q, weight=self.q_bias)
            k = in_float32(jnp.add, k, weight=self.k_bias)
            v = in_float32(jnp.add, v, weight=self.v_bias)
        q, k, v = (moves.split_heads(each, self.config.head_dim) for each in (q, k, v))
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm, eps=self.config.norm_eps)
            k = rms_norm(k, self.k_norm, eps=self.config.norm_eps)
        q, k = context.rotary.rotate(q), context.rotary.rotate(k)
        k, v = moves.spread_heads(k), moves.spread_heads(v)  # repeated where `tp` does not divide K
        scale = context.rotary.query_scale * self.config.head_dim**-0.5
        o, cache = context.attend(q, k, v=v, scale=scale, cache=cache)
        o = contract("BTQ,DQ->BTD", moves.merge_heads(o), weight=self.o, out=partitioning)
        return o, cache


class FeedForward(nnx.Module):
    """A gated feed-forward network, SwiGLU: down(up(x) * silu(gate(x)))."""

    def __init__(self, config: Config, make: Maker):
        std = config.initializer_range
        self.gate = make.normal("FD", std)
        self.up = make.normal("FD", std)
        self.down = make.normal("DF", std / math.sqrt(2 * config.num_layers))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the network to x [B, T, D], already normed. Returns the same shape."""
        partitioning = jax.typeof(x).sharding.spec
        x = moves.to_columns(x)
        gate = contract("BTD,FD->BTF", x, weight=self.gate)
        up = contract("BTD,FD->BTF", x, weight=self.up)
        return contract("BTF,DF->BTD", up * jax.nn.silu(gate), weight=self.down, out=partitioning)


class Block(nnx.Module):
    """One layer: attention, then a feed-forward network, each added to the residual stream."""

    def __init__(self, config: Config, make: Maker):
        self.norm_eps = config.norm_eps
        self.attn_norm = make.full("D", 1)
        self.attn = Attention(config, make)
        self.ffn_norm = make.full("D", 1)
        self.ffn = FeedForward(config, make)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, *, cache: KVCacheLayer | None
    ) -> tuple[Float[Array, "B T D"], KVCacheLayer | None]:
        """Run the layer. Returns the residual stream x [B, T, D] after it, and the new cache."""
        dropout = context.dropout
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attn_norm, eps=self.norm_eps)
            o, cache = self.attn(normed, context, cache=cache)
            x = x + (o if dropout is None else dropout.after_attention(o))
        with jax.named_scope("feed_forward"):
            # The backward pass ends with this half, weight gradients too, before attention's.
            x, ffn = moves.settled((x, self.ffn))
            o = ffn(rms_norm(x, self.ffn_norm, eps=self.norm_eps))
            x = x + (o if dropout is None else dropout.after_feed_forward(o))
        return x, cache


@struct.dataclass
class Output(Generic[_Cache]):
    """The result of a forward pass.

    last: [B, T, D] after the final norm, as `Decoder.logits` takes it.
    cache: the KV cache, with this pass's keys and values, of the type that was given; None if none
        was given.
    hidden_states: the embeddings and each block's output, the last one after the final norm; ()
        unless they were asked for.
    """

    last: Float[Array, "B T D"]
    cache: _Cache | None
    hidden_states: tuple[Float[Array, "B T D"], ...]


class Decoder(nnx.Module):
    """A Qwen model: its weights, and the forward pass through them.

    embedding: [V, D].
    layers: L separate blocks, for decoding and conversion; or, for training, one Block whose
        weights are stacked on a first axis L.
    final_norm: [D].
    head: [V, D], of floats or of int8; None where the embedding is also the head.
    """

    def __init__(
        self,
        config: Config,
        embedding: Weight,
        *,
        layers: Block | Sequence[Block],
        final_norm: Weight,
        head: Weight | Leaf | None,
    ):
        self.config = config
        self.embedding = embedding
        self.layers = layers if isinstance(layers, Block) else nnx.List(layers)
        self.final_norm = final_norm
        self.head = nnx.data(head)  # nnx does not see that a leaf of several arrays is data

    def replace(self, **changes: Any) -> "Decoder":
        """Return a copy of this decoder with some of the constructor's arguments replaced."""
        names = ("config", "embedding", "layers", "final_norm", "head")
        parts = {name: getattr(self, name) for name in names}
        return Decoder(**(parts | changes))

    def embed(
        self, tokens: Int[Array, "B T"], dtype: DTypeLike | None = None
    ) -> Float[Array, "B T D"]:
        """Look up the embeddings [B, T, D] of tokens, int [B, T].

        dtype: the dtype in which the pass computes; None is that of the embedding.
        """
        dtype = dtype or self.embedding.dtype
        return vocabulary.look_up(self.embedding[...], tokens, dtype=dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Compute float32 logits [B, T, V] from x [B, T, D], the `last` of an `Output`."""
        return vocabulary.logits(x, self.unembedding)

    @property
    def unembedding(self) -> Weight | Leaf:
        """The weight [V, D] that makes logits: the head, or the embedding where they are tied."""
        return self.embedding if self.head is None else self.head

    @property
    def windows(self) -> Int[np.ndarray, " L"]:
        """The most tokens that a token attends to, itself included, by layer: int32 [L].

        It is `attention.FULL` for layers without a window.
        """
        widths = self.config.layer_windows or [None] * self.config.num_layers
        return np.array([width or attention.FULL for width in widths], np.int32)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"],
        frequencies: Float[Array, "B pairs"],
        cache: _Cache | None = None,
        attend: Attend = attention.xla,
        remat: Callable[..., bool] | None = None,
        hidden_states: bool = False,
        dropout: Dropout | None = None,
        groups: Groups | None = None,
    ) -> Output[_Cache]:
        """Run all blocks and the final norm on x [B, T, D], the embeddings of tokens.

        positions: int32 [B, T], of the tokens in their sequences.
        segments: int32 [B, T]. Tokens attend to earlier tokens of their own segment; 0 is padding.
        frequencies: float32 [B, H/2], from `rope.Rope.frequencies`; dynamic NTK scales a row's by
            the length of its sequence.
        cache: earlier keys and values, for separate blocks only. Outside `jit` it is donated: use
            the result's cache instead of it.
        attend: a function of `attention.IMPLEMENTATIONS`.
        remat: a policy of `jax.checkpoint_policies`, applied to each block.
        groups: the result of `running.grouped` for this decoder's separate blocks, which callers of
            many passes make once; None makes it here.
        """
        context = Context.of_pass(
            self.config,
            positions,
            segments=segments,
            frequencies=frequencies,
            cache=cache,
            attend=attend,
            dropout=dropout,
        )
        after, cache = running.run(
            x,
            self.layers,
            groups=groups,
            windows=self.windows,
            context=context,
            cache=cache,
            remat=remat,
            hidden_states=hidden_states,
        )
        last = final_norm(after[-1], self.final_norm, eps=self.config.norm_eps)
        return Output(last, cache, (x, *after[:-1], last) if hidden_states else ())
