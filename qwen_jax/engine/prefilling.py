"""The programs that compute chunks of prompts around the passes of the decoder.

`begin` places a chunk of a few rows on the mesh; `end` writes into the rows how far they are, and
chooses the first new token of prompts that end; `score` computes log-probabilities of a prompt's
tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32

from qwen_jax import model
from qwen_jax.attention.pages import Places
from qwen_jax.engine import drawing
from qwen_jax.engine.rows import Rows
from qwen_jax.leaves.weights import Leaf, Weight
from qwen_jax.meshes import moves, sharding

_Tree = TypeVar("_Tree")
_SCORED = 64  # prompt tokens of a row whose logits are held at once


class Chunk(NamedTuple):
    """The chunks of a call of `prefill` on the devices.

    which: int32 [n], the row of each within its part of the batch.
    tokens, positions, segments: int32 [n, C]; segment 0 is padding.
    frequencies: float32 [n, H/2].
    places: where the rows have their tokens.
    adapter: int32 [n], whole on each device: the number of each row's adapter; 0 for none.
    """

    which: Int[Array, " n"]
    tokens: Int[Array, "n C"]
    positions: Int[Array, "n C"]
    segments: Int[Array, "n C"]
    frequencies: Float[Array, "n pairs"]
    places: Places
    adapter: Int[Array, " n"]


@jax.jit
def begin(
    rows: Rows,
    tokens: Int32[np.ndarray, "n C"] | Int32[Array, "n C"],
    *,
    which: Int32[np.ndarray, " n"] | Int32[Array, " n"],
    begin: Int32[np.ndarray, " n"] | Int32[Array, " n"],
    count: Int32[np.ndarray, " n"] | Int32[Array, " n"],
) -> Chunk:
    """Place chunks on the mesh, and look up what their rows know."""
    which, begin, count = (moves.spread(x, "B") for x in (which, begin, count))
    tokens = moves.spread(tokens, "BS")
    each = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = begin[:, None] + each
    segments = (each < count[:, None]).astype(jnp.int32)
    known = rows.table, rows.frequencies, rows.adapter
    table, frequencies, adapter = _taken(known, which)
    places, adapter = Places(table, begin, count), jax.reshard(adapter, P(None))
    return Chunk(which, tokens, positions, segments, frequencies, places, adapter)


def _taken(tree: _Tree, which: Int[Array, " n"]) -> _Tree:
    """Take some rows of each part of the batch from arrays [R, ...]. which: int32 [n]."""
    specs = jax.tree.map(lambda x: sharding.spec("B" + "X" * (x.ndim - 1)), tree)

    @jax.shard_map(out_specs=specs, check_vma=False)
    def local(tree: _Tree, which: jax.Array) -> _Tree:
        return jax.tree.map(lambda x: x[which], tree)

    return local(tree, which)


def _given_back(
    tree: _Tree, which: Int[Array, " n"], *, new: _Tree, real: Bool[Array, " n"]
) -> _Tree:
    """Put rows that `_taken` took back, except those that are not real."""
    specs = jax.tree.map(lambda x: sharding.spec("B" + "X" * (x.ndim - 1)), tree)

    @jax.shard_map(out_specs=specs, check_vma=False)
    def local(tree: _Tree, which: jax.Array, new: _Tree, real: jax.Array) -> _Tree:
        def put(x: jax.Array, y: jax.Array) -> jax.Array:
            return x.at[jnp.where(real, which, len(x))].set(y, mode="drop")

        return jax.tree.map(put, tree, new)

    return local(tree, which, new, real)


@functools.partial(jax.jit, donate_argnames="rows")
def end(
    head: Weight | Leaf | None,
    hidden: Float[Array, "n C D"],
    *,
    rows: Rows,
    chunk: Chunk,
    forced: Int32[np.ndarray, " n"] | Int32[Array, " n"],
    last: Bool[np.ndarray, " n"] | Bool[Array, " n"],
) -> tuple[Rows, Int32[Array, "n line"] | None]:
    """Write the end of chunks into their rows; choose the first tokens of prompts that end.

    head: the weight [V, D] that makes logits; None if no prompt ends.
    hidden: after the final norm.
    """
    count = chunk.places.count
    real = count > 0
    some = _taken(rows, chunk.which)
    finite = jnp.isfinite(hidden).all(-1) | (chunk.segments == 0)
    some = dataclasses.replace(
        some,
        written=chunk.places.written + count,
        broken=some.broken | ~finite.all(1),
    )
    if head is None:
        return _given_back(rows, chunk.which, new=some, real=real), None
    forced, last = moves.spread(forced, "B"), moves.spread(last, "B")
    at = jnp.maximum(count - 1, 0)[:, None, None]
    x = jnp.take_along_axis(hidden, at, axis=1)
    logits = model.logits(x, head)[:, 0]
    active = real & last
    some = dataclasses.replace(some, on=some.on | active)
    some, lines = drawing.choose(logits, some, forced=forced, active=active)
    return _given_back(rows, chunk.which, new=some, real=real), lines


@jax.jit
def score(
    head: Weight | Leaf,
    hidden: Float[Array, "n C D"],
    *,
    following: Int32[np.ndarray, "n C"] | Int32[Array, "n C"],
) -> Int32[Array, "n C columns"]:
    """Compute the log-probability of the token after each one, as `drawing.likelihoods` does.

    following: these tokens; -1 where none is asked for.

    The logits of a few tokens at a time are in memory.
    """
    wanted = moves.spread(following, "BS")
    n, length, _ = hidden.shape
    block = math.gcd(length, _SCORED)

    def step(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x, tokens = block
        return None, _scored(model.logits(x, head), tokens)

    def cut(x: jax.Array) -> jax.Array:  # [n, C, ...] -> [blocks, n, block, ...]
        return jnp.moveaxis(x.reshape(n, length // block, block, *x.shape[2:]), 1, 0)

    _, found = jax.lax.scan(step, None, (cut(hidden), cut(wanted)))
    found = jnp.moveaxis(found, 0, 1)
    return jax.reshard(found.reshape(n, length, found.shape[-1]), P(None, None, None))


def _scored(
    logits: Float[Array, "n block V"], tokens: Int[Array, "n block"]
) -> Int32[Array, "n block columns"]:
    """Compute the log-probabilities of tokens, int32 [n, block]; -1 is no token."""

    @jax.shard_map(out_specs=sharding.spec("BSX"), check_vma=False)
    def local(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        rows, block, vocab = logits.shape
        whole = moves.whole_rows(logits.reshape(rows * block, vocab))
        token = moves.own_rows(tokens.reshape(-1))
        found = drawing.likelihoods(whole, jnp.maximum(token, 0), wanted=token)
        return moves.all_rows(found, rows * block).reshape(rows, block, -1)

    return local(logits, tokens)
