"""Passes over one block of a decoder: the inputs of its matrices, and its output.

`Observed` is a kind of leaf: a weight that also hands the activation that it is multiplied by to
whoever traces the block, so the model need not know that it is watched.
"""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32

from qwen_jax.attention import Attend
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Leaf, Weight, map_leaves, product
from qwen_jax.meshes import gathering
from qwen_jax.model.context import Context
from qwen_jax.model.decoder import Block
from qwen_jax.quantise import algorithm
from qwen_jax.quantise.algorithm import Hessian

_Tree = TypeVar("_Tree")


class _Seen:
    """The activations that weights were multiplied by, while a program is traced."""

    def __init__(self) -> None:
        self.inputs: list[jax.Array] = []


@struct.dataclass
class Observed(Leaf):
    """A weight whose products leave their other factor in `seen`."""

    base: Weight | Leaf
    seen: _Seen = struct.field(pytree_node=False)


@product.register
def _(weight: Observed, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    weight.seen.inputs.append(x)
    return product(weight.base, equation, x, out, **kwargs)


@struct.dataclass
class Batch:
    """Rows of tokens on devices, and what a pass needs to know of them.

    tokens, positions, segments: int32 [B, T], as in `calibration.Rows`.
    counted: bool [B, T], False for padding, and for rows that only fill up the batch.
    frequencies: float32 [B, H/2], those of `rope.Rope.frequencies`.
    """

    tokens: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    segments: Int32[Array, "B T"]
    counted: Bool[Array, "B T"]
    frequencies: Float[Array, "B pairs"]


@functools.partial(jax.jit, static_argnames=("config", "attend"))
def run_block(
    x: Float[Array, "B T D"],
    block: Block,
    *,
    batch: Batch,
    window: Int32[Array, ""],
    config: Config,
    attend: Attend,
) -> Float[Array, "B T D"]:
    """Run one block on the residual stream x, and return it after the block.

    window: the most tokens that a token attends to.
    """
    context = _context(batch, window, config=config, attend=attend)
    return gathering.unshard(block, x.dtype)(x, context, cache=None)[0]


@functools.partial(jax.jit, static_argnames=("path", "config", "attend"), donate_argnames="hessian")
def observe(
    hessian: Hessian,
    x: Float[Array, "B T D"],
    block: Block,
    *,
    path: str,
    batch: Batch,
    window: Int32[Array, ""],
    config: Config,
    attend: Attend,
) -> Hessian:
    """Add the inputs of one matrix of a block to its Hessian.

    x: the residual stream before the block.
    path: the matrix's path in the block, such as "attn.q".
    """
    seen = _Seen()

    def watched(name: str, leaf: Weight) -> Weight | Observed:
        return Observed(leaf, seen) if name == path else leaf

    context = _context(batch, window, config=config, attend=attend)
    # What comes after the matrix is not computed, as nothing uses it.
    map_leaves(watched, gathering.unshard(block, x.dtype))(x, context, cache=None)
    (inputs,) = seen.inputs
    return algorithm.accumulate(hessian, inputs, counted=batch.counted)


@jax.jit
def difference(
    x: Float[Array, "B T D"], y: Float[Array, "B T D"], *, counted: Bool[Array, "B T"]
) -> Float[Array, "2"]:
    """Return the sums of squares of x - y and of y, without padding."""
    x, y = (jnp.where(counted[..., None], each, 0).astype(jnp.float32) for each in (x, y))
    return jnp.stack([jnp.sum(jnp.square(x - y)), jnp.sum(jnp.square(y))])


def _context(batch: Batch, window: Int32[Array, ""], *, config: Config, attend: Attend) -> Context:
    """Return the context of a block that attends to the last `window` tokens."""
    whole = Context.of_pass(
        config,
        batch.positions,
        segments=batch.segments,
        frequencies=batch.frequencies,
        cache=None,
        attend=attend,
    )
    return whole.in_layer(jnp.int32(0), window)
