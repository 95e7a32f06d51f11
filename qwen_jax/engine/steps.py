"""The compiled programs of the engine, and the arrays that they move on: pages and rows.

There is one program of each kind, with one shape: `decode` feeds every running row one token,
`prefill` computes a chunk of the prompts of a few rows, and small ones admit a request, write masks
of a grammar, and score a prompt. Equal shapes are what makes a request's result the same bits alone
and in a crowd. Each method starts a program and returns at once. On several processes all call the
same methods in the same order.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Int32

from qwen_jax import meshes
from qwen_jax.attention import Attend, pages
from qwen_jax.attention.pages import PagedLayer, Pages, Places
from qwen_jax.engine import drawing, prefilling, rows
from qwen_jax.engine.rows import Rows, Sizes
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import Decoder, adapted
from qwen_jax.model.adapted import GroupsByRow
from qwen_jax.model.running import Structure

SKIP, FEED = range(2)  # what a row does in a decode step, in the last column of its orders
MASKS = 8  # the most rows whose masks one call of `masks` writes


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


class State(NamedTuple):
    """The arrays that the programs move on: the pages of each layer, and the rows."""

    layers: tuple[PagedLayer, ...]
    rows: Rows


class Programs:
    """The programs of an engine, as functions of its `State`.

    Arguments and results may be arrays or, where `jax.make_jaxpr` traces a call, shapes: so a
    plan finds every program that an engine runs. What the methods do, `Steps` says.

    decoder: separate blocks, on the mesh in force, perhaps with adapters
        (`adapted.attach_several`).
    attend: a function of `attention.IMPLEMENTATIONS`.
    """

    def __init__(self, decoder: Decoder, attend: Attend, *, shape: Shape):
        self.attend, self.shape = attend, shape
        parts = [sharding.axis_sizes()[axis] for axis in sharding.BATCH]
        self.replicas = int(np.prod(parts))
        config = decoder.config
        self.sizes = Sizes(shape.rows, shape.width, config.vocab_size, config.head_dim // 2)
        tree = jax.tree.structure(decoder)
        # The structure is in the program: as an argument it would be hashed at every call.
        self._decode = jax.jit(
            functools.partial(_decode, tree=tree, attend=attend), donate_argnums=(1, 2)
        )
        self.renew(decoder)

    def renew(self, decoder: Decoder) -> None:
        """Take other weights, of the same shapes and dtypes."""
        self.decoder, self._leaves = decoder, jax.tree.leaves(decoder)
        self._groups = GroupsByRow.of(decoder)

    def state(self) -> State:
        """Make empty pages, and rows that are off."""
        layers = pages.empty(
            self.decoder.config,
            self.shape.pages * self.replicas,
            size=self.shape.size,
            dtype=self.decoder.embedding[...].dtype,
            kind=self.shape.cache_dtype,
        )
        return State(layers, rows.off(self.sizes))

    def admit(
        self, state: State, row: int, *, vector: Int32[np.ndarray, " all"]
    ) -> tuple[State, None]:
        """See `Steps`."""
        new = rows.admit(state.rows, np.int32(row), vector=vector, sizes=self.sizes)
        return State(state.layers, new), None

    def masks(
        self,
        state: State,
        which: Int32[np.ndarray, " n"],
        *,
        masks: Int32[np.ndarray, "n words"],
    ) -> tuple[State, None]:
        """See `Steps`."""
        return State(state.layers, rows.set_masks(state.rows, which, masks=masks)), None

    def decode(
        self, state: State, orders: Int32[np.ndarray, "R 3"]
    ) -> tuple[State, Int32[Array, "R line"]]:
        """See `Steps`."""
        layers, new, lines = self._decode(self._leaves, state.layers, state.rows, orders)
        return State(layers, new), lines

    def prefill(
        self,
        state: State,
        tokens: Int32[np.ndarray, "n C"],
        *,
        which: Int32[np.ndarray, " n"],
        begin: Int32[np.ndarray, " n"],
        count: Int32[np.ndarray, " n"],
        forced: Int32[np.ndarray, " n"],
        last: Bool[np.ndarray, " n"],
        scored: Int32[np.ndarray, "n C"] | None = None,
    ) -> tuple[State, tuple[Int32[Array, "n line"] | None, Int32[Array, "n C columns"] | None]]:
        """See `Steps`."""
        chunk = prefilling.begin(state.rows, tokens, which=which, begin=begin, count=count)
        output = self.decoder(
            self.decoder.embed(chunk.tokens),
            chunk.positions,
            segments=chunk.segments,
            frequencies=chunk.frequencies,
            cache=Pages(state.layers, chunk.places),
            attend=self.attend,
            groups=self._groups.select(chunk.adapter),
        )
        assert output.cache is not None
        unembedding = self.decoder.unembedding
        scores = None
        if scored is not None:
            scores = prefilling.score(unembedding, output.last, following=scored)
        head = unembedding if last.any() else None
        new, lines = prefilling.end(
            head, output.last, rows=state.rows, chunk=chunk, forced=forced, last=last
        )
        return State(output.cache.layers, new), (lines, scores)

    def idle(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return a call of each program, on rows that are off: its method, and the arguments."""
        n = self.shape.chunks * self.replicas
        none = np.zeros(n, np.int32)
        chunk = {
            "tokens": np.zeros((n, self.shape.chunk), np.int32),
            **{"which": none, "begin": none, "count": none, "forced": none - 1},
        }
        scored = np.full(chunk["tokens"].shape, -1, np.int32)
        # A row number beyond the last is nobody's.
        nobody = np.full(MASKS, self.shape.rows, np.int32)
        vector = np.zeros(rows.length(self.sizes), np.int32)
        masks = np.zeros((MASKS, self.sizes.words), np.int32)
        orders = np.tile(np.array([0, -1, SKIP], np.int32), (self.shape.rows, 1))
        return {
            "admit": ("admit", {"row": self.shape.rows, "vector": vector}),
            "masks": ("masks", {"which": nobody, "masks": masks}),
            "prefill": ("prefill", {**chunk, "last": none > 0}),
            "prefill, first token": ("prefill", {**chunk, "last": none == 0}),
            "prefill, scored": ("prefill", {**chunk, "last": none > 0, "scored": scored}),
            "decode": ("decode", {"orders": orders}),
        }


class Steps:
    """A model's programs for one engine, with its pages and rows on the devices.

    decoder: separate blocks, on the mesh, perhaps with adapters (`adapted.attach_several`).
    attend: a function of `attention.IMPLEMENTATIONS`.
    """

    def __init__(self, decoder: Decoder, attend: Attend, *, mesh: Mesh, shape: Shape):
        self.mesh, self.shape, self.attend = mesh, shape, attend
        with meshes.entered(mesh):
            self._programs = Programs(decoder, attend, shape=shape)
            self._state = self._programs.state()
        self.replicas, self.sizes = self._programs.replicas, self._programs.sizes

    @property
    def decoder(self) -> Decoder:
        """The model."""
        return self._programs.decoder

    def check(self, decoder: Decoder) -> None:
        """Raise ValueError if `renew` cannot take these weights."""
        old, new = (
            (jax.tree.structure(x), [(w.shape, w.dtype, w.sharding) for w in jax.tree.leaves(x)])
            for x in (self.decoder, decoder)
        )
        if old != new:
            raise ValueError("the new weights have other names, shapes, dtypes or partitionings")

    def renew(self, decoder: Decoder) -> None:
        """Take other weights, of the same shapes and dtypes."""
        with meshes.entered(self.mesh):
            self._programs.renew(decoder)

    def admit(self, row: int, vector: Int32[np.ndarray, " all"]) -> None:
        """Give a row, which goes off, to a request. vector: the result of `rows.entry`."""
        with meshes.entered(self.mesh):
            self._state, _ = self._programs.admit(self._state, row, vector=vector)

    def masks(self, which: Int32[np.ndarray, " n"], masks: Int32[np.ndarray, "n words"]) -> None:
        """Write the masks of ids of MASKS rows; entries with the row number R are not used."""
        with meshes.entered(self.mesh):
            self._state, _ = self._programs.masks(self._state, which, masks=masks)

    def decode(self, orders: Int32[np.ndarray, "R 3"]) -> Int32[Array, "R line"]:
        """Feed rows a token, and choose their next ones. Returns `drawing.choose`'s lines.

        orders: for each row the next page it gets (0 for none), the token that takes the place of
            the chosen one (-1 for none), and SKIP or FEED.
        """
        with meshes.entered(self.mesh):
            self._state, lines = self._programs.decode(self._state, orders)
            return moves.begin_fetch(lines)

    def prefill(
        self, tokens: Int32[np.ndarray, "n C"], **arrays: Any
    ) -> tuple[Int32[Array, "n line"] | None, Int32[Array, "n C columns"] | None]:
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
            self._state, (lines, scores) = self._programs.prefill(self._state, tokens, **arrays)
            fetched = [None if x is None else moves.begin_fetch(x) for x in (lines, scores)]
        return fetched[0], fetched[1]

    def close(self) -> None:
        """Say that no method will be called again."""

    def compile(self, report: Callable[[str, float], None]) -> None:
        """Run every program once, on rows that are off, so that no later call compiles anything.

        report: is called with each program's name and seconds.
        """
        for name, (method, arguments) in self._programs.idle().items():
            began = time.monotonic()
            jax.block_until_ready((getattr(self, method)(**arguments), self._state))
            report(name, time.monotonic() - began)


def _decode(
    leaves: list[jax.Array],
    layers: tuple[PagedLayer, ...],
    rows: Rows,
    orders: Int32[np.ndarray, "R 3"] | Int32[Array, "R 3"],
    *,
    tree: Structure[Decoder],
    attend: Attend,
) -> tuple[tuple[PagedLayer, ...], Rows, Int32[Array, "R line"]]:
    """Run `Steps.decode` with a flattened decoder (`leaves` and `tree`)."""
    decoder = adapted.select(tree.unflatten(leaves), rows.adapter)
    orders = moves.spread(orders, "BS")
    page, forced, command = orders[:, 0], orders[:, 1], orders[:, 2]
    fed = rows.on & (command == FEED)
    size = jax.tree.leaves(layers)[0].shape[3]
    table = _with_page(rows.table, rows.written // size, page=page)
    rows = dataclasses.replace(rows, table=table)
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
    rows, lines = drawing.choose(logits, rows, forced=forced, active=fed)
    return output.cache.layers, rows, lines


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
