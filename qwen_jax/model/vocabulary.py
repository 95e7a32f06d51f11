"""Operations over a sharded vocabulary: the embedding look-up, logits, and log-probabilities.

The look-up and the log-probabilities never hold the whole table or the logits of all tokens at
once. Rows of the table are gathered a chunk at a time, used for all tokens and dropped; so are
logits, forward and backward. Collectives are written by hand because their order matters.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qwen_jax.leaves.weights import Leaf, Weight, contract, precision
from qwen_jax.meshes import gathering, sharding

LOGITS_BYTES = 2**28  # the most bytes of float32 logits that a device holds at once
_ROW_MULTIPLE = 128
# Rows added to a table's gradient at once. libtpu sorts longer lists first, which takes half a
# gigabyte and, in a pod's step, a third of the compile time.
_SCATTERED = 4096
_Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames="dtype")
def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Look up the rows of a table [V, D] for tokens int [B, T]. Returns [B, T, D] in `dtype`.

    Each device looks up every token in its own rows and columns of the table; then devices exchange
    columns for tokens. The traffic is the size of the result, not of the table. Differentiable in
    reverse mode.
    """
    return _look_up(table, tokens, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    split, over_rows = _split(table, 1), _split(table, 0)

    @jax.shard_map(out_specs=sharding.spec("BTD"), check_vma=False)
    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(tokens, split) if split else tokens[None]
        rows, found = _own_rows(table, ids, over=over_rows)
        x = jnp.where(found[..., None], table.at[rows].get(mode="clip"), 0).astype(dtype)
        x = jax.lax.psum(x, over_rows) if over_rows else x
        if split:  # [devices, B, T, D of this one] -> [devices, B, T of this one, D of each]
            x = jax.lax.all_to_all(x, split, 0, 0, tiled=True)
        return jnp.moveaxis(x, 0, 2).reshape(*tokens.shape, -1)

    return local(table, tokens)


def _look_up_forward(
    table: jax.Array, tokens: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, _Pair]:
    return _look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(
    dtype: DTypeLike, saved: _Pair, dx: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    """Compute the gradient of the table: add each token's gradient to its row.

    saved: the table [V, D] and the tokens [B, T].
    dx: [B, T, D], the gradient of the result of `look_up`.

    Devices first exchange tokens for columns, as each holds only some rows and columns of the
    table.
    """
    table, tokens = saved
    split, over_rows = _split(table, 1), _split(table, 0)
    over_tokens = [axis for entry in sharding.spec("BT") for axis in sharding.entries(entry)]
    copies = tuple(axis for axis in over_tokens if axis not in split)

    @jax.shard_map(out_specs=jax.typeof(table).sharding.spec, check_vma=False)
    def local(table: jax.Array, tokens: jax.Array, dx: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(tokens, split) if split else tokens[None]
        rows, found = _own_rows(table, ids, over=over_rows)
        rows = jnp.where(found, rows, table.shape[0]).reshape(len(ids), 1, -1)
        columns = jnp.moveaxis(dx.reshape(tokens.size, len(ids), -1), 0, 2)
        columns = jax.lax.all_to_all(columns, split, 0, 0, tiled=True) if split else columns

        def step(sums: jax.Array, chunk: _Pair) -> tuple[jax.Array, None]:
            (rows,), columns = chunk
            return sums.at[rows].add(columns.T.astype(jnp.float32), mode="drop"), None

        def chunks(x: jax.Array, filler: int) -> jax.Array:
            """Cut [devices, C, tokens] into [chunks, C, size], filled up with `filler`."""
            size = min(tokens.size, _SCATTERED)
            count = -(-tokens.size // size)
            beyond = count * size - tokens.size
            x = jnp.pad(x, ((0, 0), (0, 0), (0, beyond)), constant_values=filler)
            x = x.reshape(*x.shape[:2], count, size)
            return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], size)

        every = chunks(rows, table.shape[0]), chunks(columns, 0)
        sums, _ = jax.lax.scan(step, jnp.zeros(table.shape, jnp.float32), every)
        sums = jax.lax.psum(sums, copies) if copies else sums
        return sums.astype(table.dtype)

    return local(table, tokens, dx), np.zeros(tokens.shape, jax.dtypes.float0)


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _own_rows(
    table: Float[Array, "rows D"], ids: Int[Array, "*ids"], *, over: tuple[str, ...]
) -> tuple[Int[Array, "*ids"], Bool[Array, "*ids"]]:
    """Turn token ids into row indices of this device's part of the table.

    over: the mesh axes that split the rows of the table.

    Returns the indices, and a mask of the ids whose row this device holds.
    """
    rows = ids - jax.lax.axis_index(over) * table.shape[0] if over else ids
    return rows, (rows >= 0) & (rows < table.shape[0])


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the einsum of x and y in float32; both are in x's dtype."""
    wide = jnp.float32
    return jnp.einsum(equation, x, y, precision=precision(x), preferred_element_type=wide)


def _split(x: jax.Array, axis: int) -> tuple[str, ...]:
    """Return the mesh axes that split an axis of x."""
    return sharding.entries(jax.typeof(x).sharding.spec[axis])


@jax.jit
def logits(x: Float[Array, "B T D"], head: Weight | Leaf) -> Float[Array, "B T V"]:
    """Compute float32 logits [B, T, V] from x [B, T, D] after the final norm and a head [V, D]."""
    head = gathering.unshard(head, x.dtype)
    return contract("BTD,VD->BTV", x, weight=head, preferred_element_type=jnp.float32)


class TokenScores(NamedTuple):
    """The logits and normaliser of target tokens, float32 [B, T] each.

    logit: the target's own logit; logit - lse is its log-probability.
    lse: the log-sum-exp of all logits.
    largest: the largest of all logits. Its gradient is not defined; 0 is returned.
    """

    logit: Float[Array, "B T"]
    lse: Float[Array, "B T"]
    largest: Float[Array, "B T"]


def token_scores(
    x: Float[Array, "B T D"], head: Float[Array, "V D"], *, targets: Int[Array, "B T"]
) -> TokenScores:
    """Compute logit and log-sum-exp of target tokens without ever holding all logits at once.

    x: [B, T, D] after the final norm. Its tokens may be split over the mesh axis `tp`; targets and
        results are not.
    head: [V, D], of any dtype; the logits are x head^T.
    targets: int [B, T].

    Products are computed in the dtype of x and summed in float32; the softmax is in float32.
    """
    return _token_scores(x, head, targets)


@jax.custom_vjp
def _token_scores(x: jax.Array, head: jax.Array, targets: jax.Array) -> TokenScores:
    """Scan over chunks of the head with a running maximum and sum, and combine these over `tp`."""
    layout = _Layout.of(x, head)

    @jax.shard_map(out_specs=layout.rows, check_vma=False)
    def local(x: jax.Array, head: jax.Array, targets: jax.Array) -> TokenScores:
        flat = layout.tokens(x)
        rows, found = _own_rows(head, targets.reshape(-1), over=layout.tensor)

        def step(carry: TokenScores, chunk: _Pair) -> tuple[TokenScores, None]:
            part, first = chunk
            logits = layout.logits(flat, part, first=first, rows=head.shape[0])
            largest = jnp.maximum(carry.largest, jnp.max(logits, -1))
            total = carry.lse * jnp.exp(carry.largest - largest)
            total = total + jnp.sum(jnp.exp(logits - largest[:, None]), -1)
            logit = jnp.sum(jnp.where(layout.is_target(rows, first), logits, 0), -1)
            return TokenScores(carry.logit + logit, total, largest), None

        zeros = jnp.zeros(flat.shape[0], jnp.float32)
        start = TokenScores(zeros, zeros, zeros - jnp.inf)
        own, _ = jax.lax.scan(step, start, layout.chunks(head))
        logit = jnp.where(found, own.logit, 0)
        largest, total = own.largest, own.lse
        if layout.tensor:
            logit = jax.lax.psum(logit, layout.tensor)
            largest = jax.lax.pmax(own.largest, layout.tensor)
            total = jax.lax.psum(total * jnp.exp(own.largest - largest), layout.tensor)
        scores = TokenScores(logit, largest + jnp.log(total), largest)
        return jax.tree.map(lambda s: s.reshape(targets.shape), scores)

    return local(x, head, targets)


def _forward(
    x: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[TokenScores, tuple[jax.Array, ...]]:
    scores = _token_scores(x, head, targets)
    return scores, (x, head, targets, scores.lse)


def _backward(
    saved: tuple[jax.Array, ...], cotangents: TokenScores
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Compute the gradients of x and head from logits that are computed again, chunk by chunk."""
    x, head, targets, lse = saved
    layout = _Layout.of(x, head)
    specs = tuple(jax.typeof(a).sharding.spec for a in (x, head))

    @jax.shard_map(out_specs=specs, check_vma=False)
    def local(
        x: jax.Array, head: jax.Array, targets: jax.Array, lse: jax.Array, *dscores: jax.Array
    ) -> _Pair:
        flat = layout.tokens(x)
        rows, _ = _own_rows(head, targets.reshape(-1), over=layout.tensor)
        lse, dlogit, dlse = (a.reshape(-1, 1) for a in (lse, *dscores))

        def step(dx: jax.Array, chunk: _Pair) -> _Pair:
            part, first = chunk
            part = layout.gathered(part, x.dtype)
            logits = layout.product(flat, part, first=first, rows=head.shape[0])
            dlogits = dlse * jnp.exp(logits - lse)
            dlogits = dlogits + jnp.where(layout.is_target(rows, first), dlogit, 0)
            dlogits = dlogits.astype(x.dtype)
            dx = dx + _einsum("tv,dv->td", dlogits, part)
            dpart = _einsum("tv,td->dv", dlogits, flat)
            # Summed over the mesh in the head's own dtype, if that is the wider one.
            dpart = dpart.astype(jnp.promote_types(x.dtype, head.dtype))
            return dx, layout.summed(dpart, head.dtype)

        dx, dhead = jax.lax.scan(step, jnp.zeros(flat.shape, jnp.float32), layout.chunks(head))
        dhead = dhead.reshape(-1, dhead.shape[-1])[: head.shape[0]]
        return layout.own_tokens(dx.astype(x.dtype), x), dhead

    dx, dhead = local(x, head, targets, lse, cotangents.logit, cotangents.lse)
    return dx, dhead, np.zeros(targets.shape, jax.dtypes.float0)


_token_scores.defvjp(_forward, _backward)


class _Layout(NamedTuple):
    """How a pass over all logits is split into chunks of the head [V, D] and over mesh axes.

    size: the number of ids, rows of the head, in one chunk.
    tensor: mesh axes that split V of the head.
    split: mesh axes that split D of the head.
    copies: mesh axes that split the tokens, and along which devices hold the same part of the head.
    rows: the partitioning of targets and results, [B, T].
    parted: whether the tokens of the decoder's output x [B, T, D] are also split over `tensor`.
    """

    size: int
    tensor: tuple[str, ...]
    split: tuple[str, ...]
    copies: tuple[str, ...]
    rows: P
    parted: bool

    @staticmethod
    def of(x: jax.Array, head: jax.Array) -> "_Layout":
        """Make the plan for x and head, with at most `LOGITS_BYTES` of logits at a time."""
        tensor, split = _split(head, 0), _split(head, 1)
        rows = sharding.spec("BT")
        axes = [axis for entry in rows for axis in sharding.entries(entry)]
        sizes = sharding.axis_sizes()
        tokens = x.shape[0] * x.shape[1] // math.prod(sizes[axis] for axis in axes)
        held = head.shape[0] // math.prod(sizes[axis] for axis in tensor)
        most = max(LOGITS_BYTES // (4 * tokens) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
        chunks = -(-held // most)
        size = -(-held // chunks)
        if chunks > 1:
            size = -(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE
        copies = tuple(axis for axis in axes if axis not in split)
        parted = jax.typeof(x).sharding.spec[1] != rows[1]
        return _Layout(
            size=size, tensor=tensor, split=split, copies=copies, rows=rows, parted=parted
        )

    def tokens(self, x: jax.Array) -> jax.Array:
        """Gather x [B, T of this device, D] over `tensor`, and flatten it to [tokens, D]."""
        x = jax.lax.all_gather(x, self.tensor, axis=1, tiled=True) if self.parted else x
        return x.reshape(-1, x.shape[-1])

    def own_tokens(self, dx: jax.Array, x: jax.Array) -> jax.Array:
        """Sum partial gradients [tokens, D] over `tensor`; return those of this device's tokens."""
        dx = dx.reshape(x.shape[0], -1, x.shape[2])
        if self.parted:
            return jax.lax.psum_scatter(dx, self.tensor, scatter_dimension=1, tiled=True)
        return jax.lax.psum(dx, self.tensor) if self.tensor else dx

    def chunks(self, head: jax.Array) -> _Pair:
        """Cut the head into [chunks, size, D of this device], with zeros after its last row.

        Also returns the index of each chunk's first row, int32 [chunks].
        """
        count = -(-head.shape[0] // self.size)
        padded = jnp.pad(head, ((0, count * self.size - head.shape[0]), (0, 0)))
        firsts = jnp.arange(count, dtype=jnp.int32) * self.size
        return padded.reshape(count, self.size, head.shape[1]), firsts

    def gathered(self, part: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Cast a chunk [size, D of this device] and gather it over `split` as [D, size]."""
        part = part.astype(dtype).T
        return jax.lax.all_gather(part, self.split, axis=0, tiled=True) if self.split else part

    def logits(self, x: jax.Array, part: jax.Array, *, first: jax.Array, rows: int) -> jax.Array:
        """Gather a chunk of the head, and compute its logits, float32 [tokens, size].

        x: [tokens, D].
        part: the chunk, [size, D of this device].
        first, rows: the index of the chunk's first row, and the number of rows of this device's
            head.
        """
        return self.product(x, self.gathered(part, x.dtype), first=first, rows=rows)

    def product(self, x: jax.Array, part: jax.Array, *, first: jax.Array, rows: int) -> jax.Array:
        """Compute the logits of a gathered chunk, float32 [tokens, size], -inf past the head's end.

        part: the chunk, [D, size]. x, first, rows: as in `logits`.
        """
        logits = _einsum("td,dv->tv", x, part)
        return jnp.where(first + jnp.arange(self.size) < rows, logits, -jnp.inf)

    def is_target(self, rows: jax.Array, first: jax.Array) -> jax.Array:
        """Mark the column of each token's target among a chunk's logits, bool [tokens, size].

        rows: the row of the head for each target, [tokens].
        first: the index of the chunk's first row.
        """
        return (rows - first)[:, None] == jnp.arange(self.size)

    def summed(self, dpart: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Sum the gradient [D, size] of a chunk over devices; return [size, D of this device]."""
        if self.split:
            dpart = jax.lax.psum_scatter(dpart, self.split, scatter_dimension=0, tiled=True)
        dpart = jax.lax.psum(dpart, self.copies) if self.copies else dpart
        return dpart.T.astype(dtype)
