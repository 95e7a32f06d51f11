"""The compiled programs of the engine, and the arrays that they move on: pages and rows.

There is one program of each kind, with one shape: `decode` feeds every running row one token,
`prefill` computes a chunk of the prompts of a few rows, and small ones admit a request, write masks
of a grammar, and score a prompt. Equal shapes are what makes a request's result the same bits alone
and in a crowd. Each method starts a program and returns at once. On several processes all call the
same methods in the same order.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32

from qwen_jax import meshes, model
from qwen_jax.attention import Attend, pages
from qwen_jax.attention.pages import PagedLayer, Pages, Places
from qwen_jax.engine import drawing, rows
from qwen_jax.engine.rows import Rows, Sizes
from qwen_jax.leaves.weights import Weight
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import Decoder, running
from qwen_jax.model.running import Structure

_Tree = TypeVar("_Tree")
SKIP, FEED, OFF = range(3)  # what a row does in a decode step, in the last column of its orders
MASKS = 8  # the most rows whose masks one call of `masks` writes
_SCORED = 64  # prompt tokens of a row whose logits are held at once


class Shape(NamedTuple):
    """The sizes of the programs.

    rows: R, the rows that decode.
    width: W, the most pages of a row.
    pages: the pages in the pool, for each part of the batch.
    size: the tokens in a page.
    chunk: the tokens in a chunk of a prompt.
    chunks: the prompts that one call of `prefill` computes a chunk of, for each part of the batch.
    cache_dtype: None for the model's own, or "int8".
    """

    rows: int
    width: int
    pages: int
    size: int
    chunk: int
    chunks: int
    cache_dtype: str | None = None


class Steps:
    """A model's programs for one engine, with its pages and rows on the devices.

    decoder: separate blocks, on the mesh.
    attend: a function of `attention.IMPLEMENTATIONS`.
    """

    def __init__(self, decoder: Decoder, attend: Attend, *, mesh: Mesh, shape: Shape):
        self.mesh, self.shape, self.decoder = mesh, shape, decoder
        self.attend = attend
        config = decoder.config
        parts = [sharding.axis_sizes(mesh)[axis] for axis in sharding.BATCH]
        self.replicas = int(np.prod(parts))
        self.sizes = Sizes(shape.rows, shape.width, config.vocab_size, config.head_dim // 2)
        self._leaves, self._tree = jax.tree.flatten(decoder)
        with meshes.entered(mesh):
            self._groups = running.grouped(decoder.layers)
            self._layers = pages.empty(
                config,
                shape.pages * self.replicas,
                size=shape.size,
                dtype=decoder.embedding[...].dtype,
                kind=shape.cache_dtype,
            )
            self._rows = rows.off(self.sizes)

    def admit(self, row: int, vector: Int32[np.ndarray, " n"]) -> None:
        """Give a row, which goes off, to a request. vector: the result of `rows.entry`."""
        with meshes.entered(self.mesh):
            self._rows = rows.admit(self._rows, np.int32(row), vector=vector, sizes=self.sizes)

    def masks(self, which: Int32[np.ndarray, " n"], masks: Int32[np.ndarray, "n words"]) -> None:
        """Write the masks of ids of MASKS rows; entries with the row number R are not used."""
        with meshes.entered(self.mesh):
            self._rows = rows.set_masks(self._rows, which, masks=masks)

    def decode(self, orders: Int32[np.ndarray, "R 3"]) -> Int32[Array, "R told"]:
        """Feed rows a token, and choose their next ones. Returns `drawing.choose`'s lines.

        orders: for each row the next page it gets (0 for none), the token that takes the place of
            the chosen one (-1 for none), and SKIP, FEED or OFF.
        """
        with meshes.entered(self.mesh):
            self._layers, self._rows, told = _decode(
                self._leaves,
                self._layers,
                rows=self._rows,
                orders=orders,
                tree=self._tree,
                attend=self.attend,
            )
            return moves.begin_fetch(told)

    def prefill(
        self,
        tokens: Int32[np.ndarray, "n C"],
        *,
        which: Int32[np.ndarray, " n"],
        begin: Int32[np.ndarray, " n"],
        count: Int32[np.ndarray, " n"],
        forced: Int32[np.ndarray, " n"],
        last: Bool[np.ndarray, " n"],
        scored: Int32[np.ndarray, "n C"] | None = None,
    ) -> tuple[Int32[Array, "n told"] | None, Int32[Array, "n C columns"] | None]:
        """Compute a chunk of some prompts, and choose the first token after those that end.

        tokens: padded on the right.
        which: the row of each, within its part of the batch.
        begin: the number of each chunk's first token; a multiple of the chunk length.
        count: the tokens of each chunk; 0 for entries that are not used.
        forced: the tokens that take the place of the chosen ones; -1 for none.
        last: which chunks end their prompts, and switch their rows on.
        scored: the token after each token, for log-probabilities; -1 for none.

        Returns `drawing.choose`'s lines, unless no prompt ends, and for each token that is scored
        the columns of `drawing.likelihoods`.
        """
        with meshes.entered(self.mesh):
            chunk = _begin(self._rows, tokens, which=which, begin=begin, count=count)
            output = self.decoder(
                self.decoder.embed(chunk.tokens),
                chunk.positions,
                segments=chunk.segments,
                frequencies=chunk.frequencies,
                cache=Pages(self._layers, chunk.places),
                attend=self.attend,
                groups=self._groups,
            )
            assert output.cache is not None
            self._layers = output.cache.layers
            scores = None
            if scored is not None:
                scores = moves.begin_fetch(
                    _score(self.decoder.unembedding, output.last, following=scored)
                )
            head = self.decoder.unembedding if last.any() else None
            self._rows, told = _end(
                head, output.last, rows=self._rows, chunk=chunk, forced=forced, last=last
            )
            return None if told is None else moves.begin_fetch(told), scores

    def compile(self, report: Callable[[str, float], None]) -> None:
        """Run every program once, on rows that are off, so that no later call compiles anything.

        report: is called with each program's name and seconds.
        """
        n = self.shape.chunks * self.replicas
        none = np.zeros(n, np.int32)
        chunk = {
            "tokens": np.zeros((n, self.shape.chunk), np.int32),
            **{"which": none, "begin": none, "count": none, "forced": none - 1},
        }
        orders = np.tile(np.array([0, -1, SKIP], np.int32), (self.shape.rows, 1))
        # A row number beyond the last is nobody's.
        nobody = np.full(MASKS, self.shape.rows, np.int32)
        vector = np.zeros(rows.length(self.sizes), np.int32)
        scored = np.full(chunk["tokens"].shape, -1, np.int32)
        programs: dict[str, Callable[[], object]] = {
            "admit": lambda: self.admit(self.shape.rows, vector),
            "masks": lambda: self.masks(nobody, np.zeros((MASKS, self.sizes.words), np.int32)),
            "prefill": lambda: self.prefill(**chunk, last=none > 0),
            "prefill, first token": lambda: self.prefill(**chunk, last=none == 0),
            "prefill, scored": lambda: self.prefill(**chunk, last=none > 0, scored=scored),
            "decode": lambda: self.decode(orders),
        }
        for name, program in programs.items():
            began = time.monotonic()
            jax.block_until_ready((program(), self._rows, self._layers))
            report(name, time.monotonic() - began)


@functools.partial(jax.jit, static_argnames=("tree", "attend"), donate_argnames=("layers", "rows"))
def _decode(
    leaves: list[jax.Array],
    layers: tuple[PagedLayer, ...],
    *,
    rows: Rows,
    orders: Int32[np.ndarray, "R 3"] | Int32[Array, "R 3"],
    tree: Structure[Decoder],
    attend: Attend,
) -> tuple[tuple[PagedLayer, ...], Rows, Int32[Array, "R told"]]:
    """Run `Steps.decode` with a flattened decoder (`leaves` and `tree`)."""
    decoder = tree.unflatten(leaves)
    orders = moves.spread(orders, "BS")
    page, forced, command = orders[:, 0], orders[:, 1], orders[:, 2]
    on = rows.on & (command != OFF)
    fed = on & (command == FEED)
    size = jax.tree.leaves(layers)[0].shape[3]
    table = _with_page(rows.table, rows.written // size, page=page)
    rows = dataclasses.replace(rows, table=table, on=on)
    places = Places(rows.table, rows.written, fed.astype(jnp.int32))
    output = decoder(
        decoder.embed(rows.token[:, None]),
        rows.written[:, None],
        segments=places.count[:, None],
        frequencies=rows.frequencies,
        cache=Pages(layers, places),
        attend=attend,
    )
    assert output.cache is not None
    rows = dataclasses.replace(rows, written=rows.written + places.count)
    logits = decoder.logits(output.last)[:, 0]
    rows, told = drawing.choose(logits, rows, forced=forced, active=fed)
    return output.cache.layers, rows, told


def _with_page(
    table: Int[Array, "R W"], number: Int[Array, " R"], *, page: Int[Array, " R"]
) -> Int[Array, "R W"]:
    """Return the table of pages with a new page for each row, where there is one.

    number: the place of the page among the row's.
    """

    @jax.shard_map(out_specs=sharding.spec("BS"), check_vma=False)
    def local(table: jax.Array, number: jax.Array, page: jax.Array) -> jax.Array:
        number = jnp.where(page > 0, number, table.shape[1])
        return table.at[jnp.arange(len(page)), number].set(page, mode="drop")

    return local(table, number, page)


class _Chunk(NamedTuple):
    """The chunks of a call of `prefill` on the devices.

    which: int32 [n], the row of each within its part of the batch.
    tokens, positions, segments: int32 [n, C]; segment 0 is padding.
    frequencies: float32 [n, H/2].
    places: where the rows have their tokens.
    """

    which: Int[Array, " n"]
    tokens: Int[Array, "n C"]
    positions: Int[Array, "n C"]
    segments: Int[Array, "n C"]
    frequencies: Float[Array, "n pairs"]
    places: Places


@jax.jit
def _begin(
    rows: Rows,
    tokens: Int32[np.ndarray, "n C"] | Int32[Array, "n C"],
    *,
    which: Int32[np.ndarray, " n"] | Int32[Array, " n"],
    begin: Int32[np.ndarray, " n"] | Int32[Array, " n"],
    count: Int32[np.ndarray, " n"] | Int32[Array, " n"],
) -> _Chunk:
    """Place chunks on the mesh, and look up what their rows know."""
    which, begin, count = (moves.spread(x, "B") for x in (which, begin, count))
    tokens = moves.spread(tokens, "BS")
    each = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = begin[:, None] + each
    segments = (each < count[:, None]).astype(jnp.int32)
    table, frequencies = _taken((rows.table, rows.frequencies), which)
    places = Places(table, begin, count)
    return _Chunk(which, tokens, positions, segments, frequencies, places)


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
def _end(
    head: Weight | None,
    hidden: Float[Array, "n C D"],
    *,
    rows: Rows,
    chunk: _Chunk,
    forced: Int32[np.ndarray, " n"] | Int32[Array, " n"],
    last: Bool[np.ndarray, " n"] | Bool[Array, " n"],
) -> tuple[Rows, Int32[Array, "n told"] | None]:
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
    some, told = drawing.choose(logits, some, forced=forced, active=active)
    return _given_back(rows, chunk.which, new=some, real=real), told


@jax.jit
def _score(
    head: Weight,
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
