"""The blocks of a decoder run one after the other: scanned where they are stacked, else in groups.

A scan compiles one block whatever the depth, for training and long prompts. Separate blocks are
what decoding needs, as XLA copies each slice of a stacked leaf before it multiplies a vector; they
run `GROUP` at a time through one compiled program. Nothing here knows what a block computes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax.attention import FEW, Mask
from qwen_jax.meshes import moves
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model.rope import Rotary

# Layers of a program outside `jit`: more take longer to compile, fewer need more calls.
GROUP = 4


class LayerCache(Protocol):
    """What a block asks of the keys and values that are kept for it: `attention/cache.py` has one.

    `attend` returns softmax attention of q [B, T, N, H] over this pass's k, v [B, T, K, H] and the
    kept ones, and the cache with both. past and index are what `KVCache.context` has returned.
    """

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
        index: Any,
    ) -> "tuple[jax.Array, LayerCache]": ...


class KVCache(Protocol):
    """What a pass asks of a cache: the parts of its layers, in `layers`; which kept keys the
    queries see, and where the layers write; and itself when `length` tokens more are written.
    """

    @property
    def layers(self) -> "tuple[LayerCache, ...]": ...

    def context(self, positions: jax.Array, segments: jax.Array) -> tuple[Mask | None, Any]: ...

    def advanced(self, layers: Any, length: int) -> "KVCache": ...


@struct.dataclass
class Context:
    """What the blocks of a pass share.

    rotary: the rotation of queries and keys. own: a mask over this pass's keys. past: a mask over
    the cache's keys, None without a cache and while it is empty. index: where the cache is written,
    whatever its layers need to know; None without one. dropout: None outside of training.
    """

    rotary: Rotary
    own: Mask
    past: Mask | None
    index: Any
    dropout: Dropout | None

    def in_layer(self, number: jax.Array, window: jax.Array) -> "Context":
        """The context of one layer, which sees the last `window` tokens, int32 []."""
        own = dataclasses.replace(self.own, window=window)
        past = self.past and dataclasses.replace(self.past, window=window)
        dropout = self.dropout and self.dropout.in_layer(number)
        return Context(self.rotary, own, past, self.index, dropout)


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


def scan(
    x: jax.Array,
    blocks: Any,
    *,
    windows: np.ndarray,
    context: Context,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None,
    hidden_states: bool,
) -> list[jax.Array]:
    """Run all blocks, whose leaves are stacked: x after each of them where hidden_states are asked
    for, else after the last alone. windows int32 [L]; the others as in a call of a Decoder.
    """
    first = jax.tree.map(moves.leading_axis, blocks)

    def run(x: jax.Array, block: Any, window: jax.Array, number: jax.Array) -> jax.Array:
        block = jax.tree.map(lambda w, axis: jnp.moveaxis(w, 0, axis - 1), block, first)
        here = {"window": window, "number": number, "layer": None}
        return _run_block(x, block, **here, context=context, attend=attend)[0]

    kept = run if remat is None else jax.checkpoint(run, policy=remat)

    def step(x: jax.Array, given: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, Any]:
        x = kept(x, *given)
        return x, x if hidden_states else None

    layers = jax.tree.map(lambda w, axis: jnp.moveaxis(w, axis, 1), blocks, first)
    x, stacked = jax.lax.scan(step, x, (layers, jnp.array(windows), jnp.arange(len(windows))))
    return list(stacked) if hidden_states else [x]


def in_groups(
    x: jax.Array,
    blocks: Any,
    *,
    windows: np.ndarray,
    context: Context,
    cache: Any,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None,
    hidden_states: bool,
) -> tuple[list[jax.Array], Any]:
    """Run separate blocks, or `Groups`: x as `scan` returns it, and the cache with this pass's keys
    (None without one).
    """
    after: list[jax.Array] = []
    new: list[Any] = []
    for first, leaves, tree in groups(blocks):
        numbers = slice(first, first + GROUP)
        found, written = run_group(
            after[-1] if after else x,
            leaves,
            layers=None if cache is None else cache.layers[numbers],
            windows=windows[numbers],
            first=np.int32(first),
            context=context,
            tree=tree,
            attend=attend,
            remat=remat,
            hidden_states=hidden_states,
        )
        after = [*after, *found] if hidden_states else found
        new += written
    return after, None if cache is None else cache.advanced(tuple(new), x.shape[1])


@functools.partial(
    jax.jit,
    static_argnames=("tree", "attend", "remat", "hidden_states"),
    donate_argnames="layers",
)
def run_group(
    x: jax.Array,
    leaves: list[jax.Array],
    *,
    layers: tuple[Any, ...] | None,
    windows: jax.Array,
    first: jax.Array,
    context: Context,
    tree: Any,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None = None,
    hidden_states: bool = False,
) -> tuple[list[jax.Array], list[Any]]:
    """Run a few layers, of which `first` is the number of the first: x after each of them (unless
    hidden_states, after the last alone), and what they keep. leaves and tree: of `groups`. layers:
    their caches, None without.
    """

    def run(x: jax.Array, block: Any, *of_layer: Any) -> tuple[jax.Array, Any]:
        window, number, layer = of_layer
        here = {"window": window, "number": number, "layer": layer}
        return _run_block(x, block, **here, context=context, attend=attend)

    kept = run if remat is None else jax.checkpoint(run, policy=remat)
    after, new = [], []
    for i, block in enumerate(tree.unflatten(leaves)):
        x, layer = kept(x, block, windows[i], first + i, layers and layers[i])
        if layers is not None and x.shape[1] > FEW:
            # A compiler otherwise puts off writing keys and values, and adding up x, to the end of
            # the program, and keeps what it needs for that of every layer.
            x, layer = jax.lax.optimization_barrier((x, layer))
        after.append(x)
        new.append(layer)
    return after if hidden_states else after[-1:], new


@functools.partial(jax.jit, static_argnames="attend")
def _run_block(
    x: jax.Array,
    block: Any,
    *,
    window: jax.Array,
    number: jax.Array,
    layer: Any,
    context: Context,
    attend: Callable[..., Any],
) -> tuple[jax.Array, Any]:
    """One layer. Traced once for all that are alike."""
    block = moves.unshard(block, x.dtype)
    return block(x, context.in_layer(number, window), layer=layer, attend=attend)
