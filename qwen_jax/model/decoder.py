"""The decoder: the mathematics of Qwen and nothing else.

Axis letters, used in every equation, spec, table and error message:

    B batch   T query tokens   S key tokens   D model width   L layers   V vocabulary
    N query heads   K key/value heads   G queries per KV head   H head dim   F feed-forward width
    Q = N H and U = K H, the widths of queries and of keys

A Decoder is an immutable pytree of named leaves. It knows no file, no sampling and no RoPE scheme's
formula; partitioning comes from the leaves' letters, storage from `weights.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P

from qwen_jax import attention, meshes
from qwen_jax.attention import Mask
from qwen_jax.attention import cache as kv
from qwen_jax.attention.cache import Cache, Layer
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Maker, Weight, contract
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import rope, vocabulary
from qwen_jax.model.rope import Rotary

# Layers of a program outside `jit`: more take longer to compile, fewer need more calls.
GROUP = 4


def rms_norm(x: jax.Array, weight: Any, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, then times the weight: the original's order."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return _in_float32(jnp.multiply, wide.astype(x.dtype), weight)


def _in_float32(operation: Callable[..., jax.Array], x: jax.Array, weight: Any) -> jax.Array:
    """x * weight or x + weight, of x's dtype. In float32 the result is rounded as it would be in
    bfloat16 or float16, and the weight's gradient adds up over tokens in float32.
    """
    wide = operation(x.astype(jnp.float32), weight[...].astype(jnp.float32))
    return wide.astype(x.dtype)


class Attention(nnx.Module):
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
        rotary: Rotary,
        own: Mask,
        past: Mask | None,
        layer: Layer | None,
        index: jax.Array | None,
        attend: Callable[..., Any],
    ) -> tuple[jax.Array, Layer | None]:
        """x [B, T, D]; own and past: masks over this pass's keys and over the cache's."""
        residual = jax.typeof(x).sharding.spec
        heads = self.config.num_kv_heads
        columns = moves.to_columns(x)
        keys = columns if sharding.held_heads(heads) == heads else moves.to_columns(x, False)
        q = contract("BTD,QD->BTQ", columns, self.q)
        k = contract("BTD,UD->BTU", keys, self.k)
        v = contract("BTD,UD->BTU", keys, self.v)
        if self.config.qkv_bias:
            biases = self.q_bias, self.k_bias, self.v_bias
            q, k, v = (_in_float32(jnp.add, x, b) for x, b in zip((q, k, v), biases, strict=True))
        q, k, v = (self._by_head(x) for x in (q, k, v))
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm, self.config.norm_eps)
            k = rms_norm(k, self.k_norm, self.config.norm_eps)
        q, k = rotary.rotate(q), rotary.rotate(k)
        k, v = moves.spread_heads(k), moves.spread_heads(v)
        scale = rotary.query_scale * self.config.head_dim**-0.5
        if layer is None or index is None:
            o = attention.on_shards(attend)(q, k, v, own, scale)
        else:
            o, layer = kv.attend(attend, q, k, v, own, past, scale, layer, index)
        o = jnp.reshape(o, (*o.shape[:2], -1), out_sharding=P(*jax.typeof(o).sharding.spec[:3]))
        return contract("BTQ,DQ->BTD", o, self.o, residual), layer

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
        residual = jax.typeof(x).sharding.spec
        x = moves.to_columns(x)
        gate = contract("BTD,FD->BTF", x, self.gate)
        up = contract("BTD,FD->BTF", x, self.up)
        return contract("BTF,DF->BTD", up * jax.nn.silu(gate), self.down, residual)


@struct.dataclass
class Dropout:
    """Elements set to 0 in training, the others scaled up: of the embeddings, and of what each half
    of a block adds to the residual. key: of a step; within a pass, of a layer. `drop` draws.
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
        return drop(x, jax.random.fold_in(self.key, place), self.rate)


def drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x [B, T, ...] with the share `rate` of its elements set to 0, the others divided by 1 - rate.

    An element's draw (Threefry, as of `jax.random`) follows from the key, its row, its token's
    place in the sequence, wherever `ring.zigzag` has put that, and its column: so it is the same on
    every mesh.
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


@struct.dataclass
class Context:
    """What all blocks of a pass are given: a rotation, masks over the pass's own keys and over the
    cache's, and where the cache is written. past, index: None without a cache; past is None while
    nothing is written either. Each block's window goes into its masks.
    """

    rotary: Rotary
    own: Mask
    past: Mask | None
    index: jax.Array | None
    dropout: Dropout | None


class Block(nnx.Module):
    def __init__(self, config: Config, make: Maker):
        self.norm_eps = config.norm_eps
        self.attn_norm = make.full("D", 1)
        self.attn = Attention(config, make)
        self.ffn_norm = make.full("D", 1)
        self.ffn = FeedForward(config, make)

    def __call__(
        self, x: jax.Array, dropout: Dropout | None, *context: Any
    ) -> tuple[jax.Array, Layer | None]:
        """x [B, T, D] and the context of `Attention` -> the same, and the layer's cache."""
        with jax.named_scope("attention"):
            o, layer = self.attn(rms_norm(x, self.attn_norm, self.norm_eps), *context)
            x = x + (o if dropout is None else dropout.of_attention(o))
        with jax.named_scope("feed_forward"):
            x, ffn = moves.settled((x, self.ffn))
            o = ffn(rms_norm(x, self.ffn_norm, self.norm_eps))
            x = x + (o if dropout is None else dropout.of_feed_forward(o))
        return x, layer


@struct.dataclass
class Output:
    """last [B, T, D]: after the final norm. hidden_states, where asked for: [B, T, D] each, 0 the
    embeddings, then after every block, the last one replaced by `last`. cache: None without one.
    """

    last: jax.Array
    cache: Cache | None
    hidden_states: tuple[jax.Array, ...]


class Decoder(nnx.Module):
    """layers: L separate blocks (decoding, conversion), or one Block whose leaves are stacked; or
    `Groups` of separate blocks.
    """

    def __init__(
        self,
        config: Config,
        embedding: Weight,
        layers: Any,
        final_norm: Weight,
        head: Weight | None,
    ):
        self.config = config
        self.embedding = embedding
        self.layers: Any = layers if isinstance(layers, Block | Groups) else nnx.List(layers)
        self.final_norm = final_norm
        self.head = head

    def with_config(self, config: Config) -> "Decoder":
        """The same weights, under a config of the same sizes."""
        return Decoder(config, self.embedding, self.layers, self.final_norm, self.head)

    def grouped(self) -> "Decoder":
        """The same decoder, of separate blocks, made ready for many passes outside `jit`."""
        return _with_layers(self, Groups(groups(self.layers)))

    def embed(self, tokens: jax.Array, dtype: Any = None) -> jax.Array:
        """int [B, T] -> [B, T, D] of `dtype` (None: the weights'), in which the blocks compute."""
        return _embed(self.embedding, tokens, dtype or self.embedding.dtype)

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
        frequencies: jax.Array,
        cache: Cache | None,
        dropout: Dropout | None = None,
    ) -> Context:
        """What the blocks share in a pass; arguments as those of a call."""
        scheme = rope.from_config(self.config)
        rotary, own = _rotary_and_mask(scheme, positions, segments, frequencies)
        past, index = (None, None) if cache is None else cache.context(positions, segments)
        return Context(rotary, own, past, index, dropout)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        frequencies: jax.Array,
        cache: Cache | None = None,
        attend: Callable[..., Any] = attention.xla,
        remat: Callable[..., Any] | None = None,
        hidden_states: bool = False,
        dropout: Dropout | None = None,
    ) -> Output:
        """One pass over x [B, T, D], embeddings of tokens at `positions`, int32 [B, T].

        segments int32 [B, T]: 0 is padding, tokens see their own segment only. frequencies float32
        [B, H/2]: of `rope.Rope.frequencies`. remat: a policy of `jax.checkpoint_policies`, applied
        to each block. dropout: in the blocks. A stacked decoder is scanned and keeps no cache.
        Outside `jit`, the blocks run a few at a time through one compiled program, and the cache
        passed in is donated.
        """
        context = self.context(positions, segments, frequencies, cache, dropout)
        windows, states = self.windows, [x]
        if isinstance(self.layers, Block):
            if cache is not None:
                raise ValueError("a stacked decoder keeps no cache: unstack it first")
            x, after = _scan(x, self.layers, windows, context, attend, remat, hidden_states)
            states += after
        else:
            new: list[Layer] = []
            for first, leaves, tree in groups(self.layers):
                numbers = slice(first, first + GROUP)
                layers = None if cache is None else cache.layers[numbers]
                after, written = run_group(
                    x, leaves, layers, windows[numbers], np.int32(first), context,
                    tree=tree, attend=attend, remat=remat, hidden_states=hidden_states,
                )  # fmt: skip
                x = after[-1]
                new += written
                states += after
            cache = None if cache is None else cache.advanced(tuple(new), x.shape[1])
        x = _final_norm(x, self.final_norm, self.config.norm_eps)
        return Output(x, cache, (*states[:-1], x) if hidden_states else ())


@functools.partial(jax.jit, static_argnames="scheme")
def _rotary_and_mask(
    scheme: rope.Rope, positions: jax.Array, segments: jax.Array, frequencies: jax.Array
) -> tuple[Rotary, Mask]:
    own = Mask(positions, positions, segments, segments, jnp.int32(0))
    return rope.rotary(scheme, positions, frequencies), own


@dataclasses.dataclass(frozen=True)
class Groups:
    """Separate blocks as a compiled program takes them: flat lists of leaves, `GROUP` layers each.

    To flatten modules costs the host 15 us a layer; whoever runs many passes does it once.
    """

    parts: list[tuple[int, list[jax.Array], Any]]


def groups(blocks: Any) -> list[tuple[int, list[jax.Array], Any]]:
    """The number of the first layer, the leaves and their tree, of one group after the other."""
    if isinstance(blocks, Groups):
        return blocks.parts
    starts = range(0, len(blocks), GROUP)
    return [(first, *jax.tree.flatten(list(blocks[first : first + GROUP]))) for first in starts]


def _scan(
    x: jax.Array,
    blocks: Block,
    windows: np.ndarray,
    context: Context,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None,
    hidden_states: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """x after all blocks, whose leaves are stacked; where asked for, also after each of them."""
    first = jax.tree.map(moves.leading_axis, blocks)

    def run(x: jax.Array, block: Block, window: jax.Array, number: jax.Array) -> jax.Array:
        block = jax.tree.map(lambda w, axis: jnp.moveaxis(w, 0, axis - 1), block, first)
        return _run_block(x, block, window, number, None, context, attend)[0]

    kept = run if remat is None else jax.checkpoint(run, policy=remat)

    def step(x: jax.Array, given: tuple[Block, jax.Array, jax.Array]) -> tuple[Any, Any]:
        x = kept(x, *given)
        return x, x if hidden_states else None

    layers = jax.tree.map(lambda w, axis: jnp.moveaxis(w, axis, 1), blocks, first)
    x, stacked = jax.lax.scan(step, x, (layers, jnp.array(windows), jnp.arange(len(windows))))
    return x, list(stacked) if hidden_states else []


@functools.partial(
    jax.jit,
    static_argnames=("tree", "attend", "remat", "hidden_states"),
    donate_argnames="layers",
)
def run_group(
    x: jax.Array,
    leaves: list[jax.Array],
    layers: tuple[Layer, ...] | None,
    windows: jax.Array,
    first: jax.Array,
    context: Context,
    *,
    tree: Any,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None = None,
    hidden_states: bool = False,
) -> tuple[list[jax.Array], list[Layer | None]]:
    """Run a few layers, of which `first` is the number of the first: x after each of them (unless
    hidden_states, after the last alone), and what they keep. leaves and tree: of `groups`.
    """

    def run(x: jax.Array, block: Block, *of_layer: Any) -> tuple[jax.Array, Layer | None]:
        return _run_block(x, block, *of_layer, context, attend)

    kept = run if remat is None else jax.checkpoint(run, policy=remat)
    after, new = [], []
    for i, block in enumerate(tree.unflatten(leaves)):
        x, layer = kept(x, block, windows[i], first + i, layers and layers[i])
        if layers is not None and x.shape[1] > attention.FEW:
            # A compiler otherwise puts off writing keys and values, and adding up x, to the end of
            # the program, and keeps what it needs for that of every layer.
            x, layer = jax.lax.optimization_barrier((x, layer))
        after.append(x)
        new.append(layer)
    return after if hidden_states else after[-1:], new


@functools.partial(jax.jit, static_argnames="attend")
def _run_block(
    x: jax.Array,
    block: Block,
    window: jax.Array,
    number: jax.Array,
    layer: Layer | None,
    context: Context,
    attend: Callable[..., Any],
) -> tuple[jax.Array, Layer | None]:
    """One layer. Traced once for all that are alike."""
    own, past = (
        mask and dataclasses.replace(mask, window=window) for mask in (context.own, context.past)
    )
    dropout = context.dropout and context.dropout.in_layer(number)
    block = moves.unshard(block, x.dtype)
    return block(x, dropout, context.rotary, own, past, layer, context.index, attend)


@functools.partial(jax.jit, static_argnames="dtype")
def _embed(table: Weight, tokens: jax.Array, dtype: Any) -> jax.Array:
    return vocabulary.look_up(table[...], tokens, dtype)


@functools.partial(jax.jit, static_argnames="eps")
def _final_norm(x: jax.Array, weight: Weight, eps: float) -> jax.Array:
    return rms_norm(x, moves.unshard(weight, x.dtype), eps)


@jax.jit
def logits(x: jax.Array, head: Weight) -> jax.Array:
    """[B, T, D] after the final norm and a head [V, D] -> float32 [B, T, V]."""
    head = moves.unshard(head, x.dtype)
    return contract("BTD,VD->BTV", x, head, preferred_element_type=jnp.float32)


def create(config: Config, key: jax.Array, dtype: Any) -> Decoder:
    """A decoder with fresh weights (the original's: N(0, 0.02^2), both projections back into
    the residual divided by sqrt(2 L), biases 0, norms 1), partitioned over the mesh in force.
    """
    make = _maker(config, key, dtype)
    blocks = [Block(config, make) for _ in range(config.num_layers)]
    return _assemble(config, make, blocks)


def abstract(config: Config, dtype: Any) -> Decoder:
    """The decoder as shapes and partitionings: no memory is used, whatever the size."""

    def make() -> Maker:  # a key too is made as a shape: the devices may not be there
        return _maker(config, jax.random.key(0), dtype)

    block = jax.eval_shape(lambda: Block(config, make()))
    blocks = [jax.tree.map(lambda leaf: leaf, block) for _ in range(config.num_layers)]
    outer = jax.eval_shape(lambda: _assemble(config, make(), []))
    return Decoder(config, outer.embedding, blocks, outer.final_norm, outer.head)


def stack(decoder: Decoder, consume: bool = False) -> Decoder:
    """The same decoder, its blocks' leaves stacked on a first axis L: one program for any depth.

    consume: let go of each leaf when it is stacked, so that beside the weights only one leaf of all
    layers is there twice.
    """

    def stacked(*leaves: Weight) -> Weight:
        arrays = [leaf[...] for leaf in leaves]
        whole = _stack(arrays)
        for array in arrays if consume else ():
            array.delete()
        return Weight(whole, letters=f"L{leaves[0].letters}")

    blocks = jax.tree.map(stacked, *decoder.layers, is_leaf=lambda x: isinstance(x, Weight))
    return _with_layers(decoder, blocks)


@jax.jit
def _stack(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack(arrays)


def unstack(decoder: Decoder) -> Decoder:
    """The inverse of `stack`, for whoever trains and then decodes: under `jit`, else each layer of
    each leaf is a program of its own. Donating saves nothing, as no part has the size of the whole.
    """

    def block(i: int) -> Block:
        def one(leaf: Weight) -> Weight:
            return Weight(leaf[i], letters=leaf.letters.removeprefix("L"))

        return jax.tree.map(one, decoder.layers, is_leaf=lambda x: isinstance(x, Weight))

    return _with_layers(decoder, [block(i) for i in range(decoder.config.num_layers)])


def _with_layers(decoder: Decoder, layers: Any) -> Decoder:
    return Decoder(decoder.config, decoder.embedding, layers, decoder.final_norm, decoder.head)


def _assemble(config: Config, make: Maker, blocks: list[Block]) -> Decoder:
    std = config.initializer_range
    head = None if config.tie_embeddings else make.normal("VD", std)
    return Decoder(config, make.normal("VD", std), blocks, make.full("D", 1), head)


def _maker(config: Config, key: jax.Array, dtype: Any) -> Maker:
    meshes.check(config.sizes, jax.sharding.get_abstract_mesh())
    return Maker(config.sizes, key, dtype)
