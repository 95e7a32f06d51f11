"""Runs the blocks of a decoder in order: stacked blocks in one scan, separate blocks in groups.

A scan compiles one block whatever the depth, which suits training and long prompts. Decoding needs
separate blocks, as XLA copies each slice of a stacked leaf before it multiplies a vector; they run
`GROUP` at a time through one compiled program. Nothing here knows what a block computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from qwen_jax.attention import FEW
from qwen_jax.meshes import gathering
from qwen_jax.model.context import Context, KVCache, KVCacheLayer

# Layers in one compiled program outside `jit`. More take longer to compile, fewer need more calls.
GROUP = 4

_Tree = TypeVar("_Tree", covariant=True)
_Cache = TypeVar("_Cache", bound=KVCache)


class Layer(Protocol):
    """One layer of a decoder: a pytree of weights that is called with the residual stream."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, *, cache: KVCacheLayer | None
    ) -> tuple[Float[Array, "B T D"], KVCacheLayer | None]:
        """Run the layer. Returns x after it, and the new cache."""
        ...


class Structure(Protocol[_Tree]):
    """The structure of a flattened tree: jax's `PyTreeDef`, with the type of the tree."""

    def unflatten(self, leaves: Iterable[jax.Array], /) -> _Tree:
        """Make the tree from its leaves."""
        ...


@dataclasses.dataclass(frozen=True)
class Groups:
    """Separate blocks flattened for the compiled program, `GROUP` layers at a time.

    Flattening modules costs the host 15 us a layer, so callers that run many passes do it once.

    parts: the number of the first layer, the leaves, and their tree, for each group.
    """

    parts: list[tuple[int, list[jax.Array], Structure[list[Layer]]]]


def grouped(blocks: Layer | Sequence[Layer]) -> Groups:
    """Flatten separate blocks into groups. Raises ValueError for one stacked block."""
    if not isinstance(blocks, Sequence):
        raise ValueError("a stacked decoder has no separate layers: unstack it first")
    starts = range(0, len(blocks), GROUP)
    return Groups([(i, *jax.tree.flatten(list(blocks[i : i + GROUP]))) for i in starts])


def run(
    x: Float[Array, "B T D"],
    blocks: Layer | Sequence[Layer],
    *,
    groups: Groups | None,
    windows: Int[np.ndarray, " L"],
    context: Context,
    cache: _Cache | None,
    remat: Callable[..., bool] | None,
    hidden_states: bool,
) -> tuple[list[Float[Array, "B T D"]], _Cache | None]:
    """Run all blocks on the residual stream x [B, T, D].

    Returns x after each block with hidden_states, else after the last one alone; and the cache with
    this pass's keys and values.

    blocks: one stacked block, or a sequence of separate blocks.
    groups: the separate blocks, flattened beforehand; None flattens them here.
    windows: int32 [L], the number of tokens that each layer attends to.
    The other arguments are those of a call of `Decoder`.
    """
    if isinstance(blocks, Sequence):
        return _in_groups(
            x,
            groups or grouped(blocks),
            windows=windows,
            context=context,
            cache=cache,
            remat=remat,
            hidden_states=hidden_states,
        )
    if cache is not None:
        raise ValueError("a stacked decoder keeps no cache: unstack it first")
    after = _scan(
        x, blocks, windows=windows, context=context, remat=remat, hidden_states=hidden_states
    )
    return after, None


def _scan(
    x: Float[Array, "B T D"],
    blocks: Layer,
    *,
    windows: Int[np.ndarray, " L"],
    context: Context,
    remat: Callable[..., bool] | None,
    hidden_states: bool,
) -> list[Float[Array, "B T D"]]:
    """Run stacked blocks in one scan. Arguments and result as for `run`, without a cache."""
    first = jax.tree.map(gathering.leading_axis, blocks)

    def run(x: jax.Array, block: Layer, window: jax.Array, number: jax.Array) -> jax.Array:
        block = jax.tree.map(lambda w, axis: jnp.moveaxis(w, 0, axis - 1), block, first)
        return _run_block(x, block, window=window, number=number, layer=None, context=context)[0]

    kept = run if remat is None else jax.checkpoint(run, policy=remat)

    def step(
        x: jax.Array, given: tuple[Layer, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        x = kept(x, *given)
        return x, x if hidden_states else None

    layers = jax.tree.map(lambda w, axis: jnp.moveaxis(w, axis, 1), blocks, first)
    x, stacked = jax.lax.scan(step, x, (layers, jnp.array(windows), jnp.arange(len(windows))))
    return [x] if stacked is None else list(stacked)


def _in_groups(
    x: Float[Array, "B T D"],
    groups: Groups,
    *,
    windows: Int[np.ndarray, " L"],
    context: Context,
    cache: _Cache | None,
    remat: Callable[..., bool] | None,
    hidden_states: bool,
) -> tuple[list[Float[Array, "B T D"]], _Cache | None]:
    """Run separate blocks, a group at a time. Arguments and results as for `run`."""
    after: list[jax.Array] = []
    new: list[KVCacheLayer] = []
    for first, leaves, tree in groups.parts:
        numbers = slice(first, first + GROUP)
        found, written = run_group(
            after[-1] if after else x,
            leaves,
            layers=None if cache is None else cache.layers[numbers],
            windows=windows[numbers],
            first=np.int32(first),
            context=context,
            tree=tree,
            remat=remat,
            hidden_states=hidden_states,
        )
        after = [*after, *found] if hidden_states else found
        new += written
    return after, None if cache is None else cache.advanced(tuple(new), x.shape[1])


@functools.partial(
    jax.jit,
    static_argnames=("tree", "remat", "hidden_states"),
    donate_argnames="layers",
)
def run_group(
    x: Float[Array, "B T D"],
    leaves: list[jax.Array],
    *,
    layers: tuple[KVCacheLayer, ...] | None,
    windows: Int32[Array, " layers"],
    first: Int32[Array, ""],
    context: Context,
    tree: Structure[list[Layer]],
    remat: Callable[..., bool] | None = None,
    hidden_states: bool = False,
) -> tuple[list[Float[Array, "B T D"]], list[KVCacheLayer | None]]:
    """Run one group of layers on the residual stream x [B, T, D].

    Returns x after each layer with hidden_states, else after the last one alone, and the updated
    caches of the layers.

    leaves, tree: one part of `Groups`.
    layers: the caches of these layers, or None.
    windows: int32, the number of tokens that each of these layers attends to.
    first: the number of the group's first layer, int32 [].
    """

    def run(
        x: jax.Array,
        block: Layer,
        window: jax.Array,
        number: jax.Array,
        layer: KVCacheLayer | None,
    ) -> tuple[jax.Array, KVCacheLayer | None]:
        return _run_block(x, block, window=window, number=number, layer=layer, context=context)

    kept = run if remat is None else jax.checkpoint(run, policy=remat)
    after, new = [], []
    for i, block in enumerate(tree.unflatten(leaves)):
        layer = None if layers is None else layers[i]
        x, layer = kept(x, block, windows[i], first + i, layer)
        if layers is not None and x.shape[1] > FEW:
            # Otherwise the compiler defers the cache writes and the sums of x to the end of the
            # program, and keeps the operands of every layer until then.
            x, layer = jax.lax.optimization_barrier((x, layer))
        after.append(x)
        new.append(layer)
    return after if hidden_states else after[-1:], new


@jax.jit
def _run_block(
    x: Float[Array, "B T D"],
    block: Layer,
    *,
    window: Int32[Array, ""],
    number: Int32[Array, ""],
    layer: KVCacheLayer | None,
    context: Context,
) -> tuple[Float[Array, "B T D"], KVCacheLayer | None]:
    """Run one layer. It is traced once for all layers of the same shapes."""
    block = gathering.unshard(block, x.dtype)
    return block(x, context.in_layer(number, window), cache=layer)
