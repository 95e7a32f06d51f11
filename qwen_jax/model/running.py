"""Runs the blocks of a decoder in order: stacked blocks in one scan, separate blocks in groups.

A scan compiles one block whatever the depth, which suits training and long prompts. Decoding needs
separate blocks, as XLA copies each slice of a stacked leaf before it multiplies a vector; they run
`GROUP` at a time through one compiled program. Nothing here knows what a block computes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from qwen_jax.attention import FEW, Mask
from qwen_jax.meshes import moves
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model.rope import Rotary

# Layers in one compiled program outside `jit`. More take longer to compile, fewer need more calls.
GROUP = 4


class KVCacheLayer(Protocol):
    """The interface of one layer's KV cache, which `attention/cache.py` implements.

    `attend` returns softmax attention of q [B, T, N, H] over this pass's k, v [B, T, K, H] and the
    cached ones, and the cache with both. past and index are the results of `KVCache.context`.
    """

    def attend(
        self,
        implementation: Callable[..., Any],
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
    """The values that all blocks of a pass share.

    rotary: the rotation of queries and keys.
    own: a mask over this pass's keys.
    past: a mask over the cached keys; None without a cache, or while it is empty.
    index: where the layers write into the cache, in the cache's own terms; None without one.
    dropout: the dropout of a training step, else None.
    """

    rotary: Rotary
    own: Mask
    past: Mask | None
    index: Any
    dropout: Dropout | None

    def in_layer(self, number: jax.Array, window: jax.Array) -> "Context":
        """Return the context of one layer, which attends to the last `window` tokens, int32 []."""
        own = dataclasses.replace(self.own, window=window)
        past = self.past and dataclasses.replace(self.past, window=window)
        dropout = self.dropout and self.dropout.in_layer(number)
        return Context(self.rotary, own, past, self.index, dropout)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Separate blocks flattened for the compiled program, `GROUP` layers at a time.

    Flattening modules costs the host 15 us a layer, so callers that run many passes do it once.

    parts: the number of the first layer, the leaves, and their tree, for each group.
    """

    parts: list[tuple[int, list[jax.Array], Any]]


def groups(blocks: Any) -> list[tuple[int, list[jax.Array], Any]]:
    """Flatten separate blocks into groups: first layer number, leaves, and their tree."""
    if isinstance(blocks, Groups):
        return blocks.parts
    starts = range(0, len(blocks), GROUP)
    return [(first, *jax.tree.flatten(list(blocks[first : first + GROUP]))) for first in starts]


def scan(
    x: Float[Array, "B T D"],
    blocks: Any,
    *,
    windows: Int[np.ndarray, " L"],
    context: Context,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None,
    hidden_states: bool,
) -> list[jax.Array]:
    """Run stacked blocks on the residual stream x [B, T, D].

    Returns x after each block with hidden_states, else after the last one alone. windows: int32
    [L]. The other arguments are those of a call of `Decoder`.
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
    x: Float[Array, "B T D"],
    blocks: Any,
    *,
    windows: Int[np.ndarray, " L"],
    context: Context,
    cache: Any,
    attend: Callable[..., Any],
    remat: Callable[..., Any] | None,
    hidden_states: bool,
) -> tuple[list[jax.Array], Any]:
    """Run unstacked blocks, a list or `Groups`, on the residual stream x [B, T, D].

    Arguments and returned x: see `scan`. Also returns the cache with this pass's keys and values.
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
    x: Float[Array, "B T D"],
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
    """Run one group of layers on the residual stream x [B, T, D].

    Returns x after each layer with hidden_states, else after the last one alone, and the updated
    caches of the layers.

    leaves, tree: one group from `groups`.
    layers: the caches of these layers, or None.
    windows: int32, the number of tokens that each of these layers attends to.
    first: the number of the group's first layer, int32 [].
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
            # Otherwise the compiler defers the cache writes and the sums of x to the end of the
            # program, and keeps the operands of every layer until then.
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
    """Run one layer. It is traced once for all layers of the same shapes."""
    block = moves.unshard(block, x.dtype)
    return block(x, context.in_layer(number, window), cache=layer, attend=attend)
