"""Attention from a few query tokens to a KV cache, for NVIDIA GPUs (Pallas, Triton).

A decode step takes as long as reading the cache does. The visible blocks of slots are divided among
`splits` Triton programs for each head, so that one long sequence fills the chip. Each program
writes a partial output and its log-sum-exp, and a small second kernel merges them into one softmax
(flash-decoding). All queries of a head share each read, as the rows of one matrix product. The
softmax is in base 2.

The cache is a ring of slots for each sequence (`triton_decode`), or pages of a pool, which a table
assigns to sequences (`triton_paged_decode`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import (
    HEAD_DIMS,
    LOG2E,
    LOWEST,
    MASKED,
    CacheLeaf,
    PoolLeaf,
    Quantised,
    Ref,
    decline,
    decline_page,
)

NAME = "decode_triton"
FAMILY = "pallas_triton"  # its name in the table of measured lines
DTYPES = ("float16", "bfloat16", "float32")
_ROWS = (16, 32)  # the least rows in a tensor core's product, and the most in a program
_PROGRAMS = 1024  # several for each multiprocessor of any chip, so that none idles for long
_SPLIT_SLOTS = (256, 4096)  # the least and the most slots in a split of a full cache
_BLOCK_BYTES = 2**14  # bytes of keys read at once, in the dtype that tensor cores multiply
_MERGED = 2**13  # partial results that a program of the second kernel holds


class TritonShape(NamedTuple):
    """The sizes by which the decode kernel divides its work.

    tokens, heads, kv_heads, dim, slots: T, N, K, H and S.
    rows: matrix rows in a program's product, one for each query and padding.
    row_blocks: programs among which the queries of a key/value head are divided.
    planes, width: the head dim is cut into `planes` interleaved parts (two for int8), each padded
        to `width` columns.
    block: cache slots that are read at once.
    splits: programs among which the slots of a head are divided.
    page: slots in a page, a multiple of `block`; 0 for a ring of slots for each sequence.
    """

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    slots: int
    rows: int
    row_blocks: int
    planes: int
    width: int
    block: int
    splits: int
    page: int = 0

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads


class Queries(NamedTuple):
    """The queries of one Triton program, in arrays [rows].

    place: the index of the query among the T N queries of its sequence.
    t: the index of its token among the T tokens.
    real: False for padding of the matrix product.
    factor: the factor on its scores, in base 2.
    skip: how many of the tokens that query 0 sees are too old for this query's window.
    """

    place: jax.Array
    t: jax.Array
    real: jax.Array
    factor: jax.Array
    skip: jax.Array


class Partial(NamedTuple):
    """The running softmax of one Triton program's queries.

    largest: [rows], the largest score so far.
    total: [rows, block], exponentials, to be summed over the block in the end.
    zeros: [rows, block], exponentials times the zeros of quantised values, to be summed likewise.
    o: the planes of the output, [rows, width] each, before division by the total.
    """

    largest: jax.Array
    total: jax.Array
    zeros: jax.Array
    o: tuple[jax.Array, ...]


def triton_decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache_k: CacheLeaf,
    cache_v: CacheLeaf,
    start: Int[Array, " B"],
    index: Int[Array, ""],
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
    *,
    interpret: bool | None = None,
    block: int | None = None,
    splits: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from a few query tokens to a ring of cached keys and to this pass's own keys.

    q: [B, T, N, H].
    k, v: [B, T, K, H], of this pass.
    cache_k, cache_v: [B, K, S, H], arrays of q's dtype, or int8 leaves with values, scale and zero
        (or None).
    start, index: int32 [B] and [], the write index at which each sequence began, and the current
        write index. Token p of sequence b lies in slot (start[b] + p) mod S; `index - start` tokens
        are written, and query t is token index - start + t. A query before token 0 is padding and
        gets 0.
    window: int32 [], the number of tokens that a query sees, its own included.
    scale: float32 [B, T], the factor on each query's scores.
    interpret: whether to interpret the kernel; None does so on a CPU only.
    block: cache slots that are read at once, a power of 2 from 16.
    splits: programs among which the slots of a head are divided.
    warps, stages: the warps and pipeline stages of a program, as in Triton; stages - 1 blocks are
        loaded ahead.

    Sizes that are None are measured ones, or else chosen. Returns o [B, T, N, H] in q's dtype.
    Raises NotImplementedError for calls that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "gpu") if interpret is None else interpret
    choice.need_gpu(NAME, 7.5)
    decline(NAME, q, k=k, dtypes=DTYPES, head_dims=HEAD_DIMS)
    leaves = [_arrays(leaf, q.dtype) for leaf in (cache_k, cache_v)]
    cached = cache_k.values if isinstance(cache_k, Quantised) else cache_k
    kv_heads, slots = cached.shape[1:3]
    sizes = choice.blocks(
        FAMILY, "decode", head_dim=q.shape[-1], dtype=cached.dtype.name, length=slots
    )
    shape = _shape(q, leaves[0][0], kv_heads, slots, block or sizes.get("block"), splits)
    warps, stages = warps or sizes.get("warps", 4), stages or sizes.get("stages", 3)
    own = [k.astype(q.dtype), v.astype(q.dtype)]
    places = Ring(start, index)
    (o,) = _call(shape, places, window, scale, q, own, leaves, warps, stages, interpret)
    return o


def triton_paged_decode(
    q: Float[Array, "B T N H"],
    kv: PoolLeaf,
    table: Int[Array, "B W"],
    written: Int[Array, " B"],
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
    *,
    interpret: bool | None = None,
    block: int | None = None,
    splits: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend from a few query tokens to the tokens in the pages of their rows.

    q: [B, T, N, H]; query t of row b is token written[b] + t.
    kv: [P, 2, K, page, H], keys and values, an array of q's dtype or an int8 leaf with values and
        scale.
    table: int32 [B, W], the pages of each row; token p lies in slot p mod page of page p // page.
    written: int32 [B], the tokens of each row in its pages.
    window: int32 [], the number of tokens that a query sees, its own included.
    scale: float32 [B, T], the factor on each query's scores.
    interpret: whether to interpret the kernel; None does so on a CPU only.
    block: slots of a page that are read at once, a power of 2 from 16.
    splits: programs among which the slots of a head are divided.

    Sizes that are None are chosen. Returns o [B, T, N, H] and the log-sum-exp of the scores
    [B, T, N], in float32: 0 and -inf for a query that sees no key. Raises NotImplementedError for
    calls that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "gpu") if interpret is None else interpret
    choice.need_gpu(NAME, 7.5)
    decline(NAME, q, k=kv, dtypes=DTYPES, head_dims=HEAD_DIMS)
    decline_page(NAME, kv, multiple=_ROWS[0])
    leaf = _arrays(kv, q.dtype)
    kv_heads, page = kv.shape[2:4]
    shape = _shape(q, leaf[0], kv_heads, page * table.shape[1], block, splits)
    block = min(shape.block, page & -page)  # the largest power of 2 that divides a page
    shape = shape._replace(page=page, block=block)
    o, lse = _call(
        shape, Pages(table, written), window, scale, q, [], [leaf, leaf], 4, 3, interpret
    )
    return o, lse.reshape(q.shape[:3])


def _call(
    shape: TritonShape,
    places: "Ring | Pages",
    window: jax.Array,
    scale: jax.Array,
    q: jax.Array,
    own: list[jax.Array],
    leaves: list[list[jax.Array]],
    warps: int,
    stages: int,
    interpret: bool,
) -> list[jax.Array]:
    """Run the kernel and, with several splits, the one that merges them.

    places: the arrays that say where sequences lie.
    own: k, v [B, T, K, H] of this pass; none for pages.
    leaves: the arrays of keys and of values, from `_arrays`; for pages the same ones twice.

    Returns o [B, T, N, H] in q's dtype or, for pages, o in float32, and the log-sum-exp [B, T N].
    """
    batch, _, _, dim = q.shape
    rows = shape.tokens * shape.heads
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    whole = [jax.ShapeDtypeStruct((batch, rows, dim), q.dtype)]
    if shape.page:
        whole = [float32((batch, rows, dim)), float32((batch, rows))]
    parts = [float32((batch, rows, shape.splits, dim)), float32((batch, rows, shape.splits))]
    outs = pl.pallas_call(
        functools.partial(_kernel, shape, interpret),
        out_shape=whole if shape.splits == 1 else parts,
        grid=(shape.splits * shape.row_blocks, shape.kv_heads, batch),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=NAME,
    )(
        *jax.tree.map(lambda x: x.astype(jnp.int32), (places, window)),
        scale.astype(jnp.float32),
        q.reshape(batch, rows, dim),
        own,
        leaves,
    )
    if shape.splits > 1:
        columns = max(16, min(128, _MERGED // pl.next_power_of_2(shape.splits)))
        outs = pl.pallas_call(
            functools.partial(_merge, shape, columns),
            out_shape=whole,
            grid=(pl.cdiv(dim, columns), rows, batch),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name=f"{NAME}_merge",
        )(*outs)
    return [outs[0].reshape(q.shape), *outs[1:]]


def _arrays(leaf: CacheLeaf | PoolLeaf, dtype: DTypeLike) -> list[jax.Array]:
    """Return a cache leaf's arrays: values and, for a quantised leaf, its scale and zero, if any.

    Pairs of int8 are viewed as int16, because tensor cores want values in an order that only 16-bit
    numbers can be loaded in. XLA makes no copy of the view.

    dtype: the dtype of the queries. Raises NotImplementedError for a float cache of another dtype.
    """
    if isinstance(leaf, Quantised):
        pairs = leaf.values.reshape(*leaf.values.shape[:-1], -1, 2)
        arrays = [lax.bitcast_convert_type(pairs, jnp.int16), leaf.scale, leaf.zero]
        return [x for x in arrays if x is not None]
    if leaf.dtype != dtype:
        raise NotImplementedError(f"{NAME}: a cache of {leaf.dtype}, only {dtype} or int8")
    return [leaf]


def _shape(
    q: jax.Array,
    values: jax.Array,
    kv_heads: int,
    slots: int,
    block: int | None,
    splits: int | None,
) -> TritonShape:
    """Choose the sizes by which the decode kernel divides its work.

    q: [B, T, N, H].
    values: the array of cached values from `_arrays`.
    kv_heads, slots: K and S.
    block, splits: sizes to use; None chooses them.

    The number of splits follows from S, not from how many slots are written; those are divided
    evenly among the splits when the kernel runs.
    """
    batch, tokens, heads, dim = q.shape
    queries = tokens * heads // kv_heads
    rows = min(max(pl.next_power_of_2(queries), _ROWS[0]), _ROWS[1])
    row_blocks = pl.cdiv(queries, rows)
    planes = dim // values.shape[-1]
    width = pl.next_power_of_2(values.shape[-1])
    if block is None:
        block = min(64, _BLOCK_BYTES // (planes * width * q.dtype.itemsize))
    if splits is None:
        programs = batch * kv_heads * row_blocks
        least, most = _SPLIT_SLOTS
        wanted = max(pl.cdiv(_PROGRAMS, programs), pl.cdiv(slots, most))
        splits = max(1, min(wanted, slots // least))
    return TritonShape(
        tokens, heads, kv_heads, dim, slots, rows, row_blocks, planes, width, block, splits
    )


class Ring(NamedTuple):
    """Where the kernel finds sequences in a cache of slots [B, K, S, H].

    start, index: int32 [B] and [], as in `triton_decode`.
    """

    start: Ref
    index: Ref

    def written(self, b: jax.Array, shape: TritonShape) -> jax.Array:
        """Return the number of a sequence's written tokens, below 0 for padding.

        A row may begin arbitrarily far ahead of the index; the bound keeps arithmetic in range.
        """
        return jnp.maximum(self.index[...] - self.start[b], -shape.tokens)

    def slot(self, token: jax.Array, b: jax.Array, shape: TritonShape) -> jax.Array:
        """Return the slot of a sequence's token."""
        start, token = (lax.rem(x, shape.slots) for x in (self.start[b], token))
        slot = lax.rem(start + token, shape.slots)
        return jnp.where(slot < 0, slot + shape.slots, slot)

    def block(
        self, i: jax.Array, b: jax.Array, head: jax.Array, side: int, shape: TritonShape
    ) -> tuple[tuple[Any, ...], jax.Array]:
        """Return the indices of a sequence's head in the cache, and of the slots of its block i."""
        return (b, head), i * shape.block + jnp.arange(shape.block)


class Pages(NamedTuple):
    """Where the kernel finds sequences in a pool of pages [P, 2, K, page, H].

    table, written: int32 [B, W] and [B], as in `triton_paged_decode`.
    """

    table: Ref
    written_tokens: Ref

    def written(self, b: jax.Array, shape: TritonShape) -> jax.Array:
        """Return the number of a sequence's written tokens."""
        return self.written_tokens[b]

    def slot(self, token: jax.Array, b: jax.Array, shape: TritonShape) -> jax.Array:
        """Return the slot of a sequence's token, counted through its pages."""
        return token

    def block(
        self, i: jax.Array, b: jax.Array, head: jax.Array, side: int, shape: TritonShape
    ) -> tuple[tuple[Any, ...], jax.Array]:
        """Return the indices of a head in the page of block i, and of the block's slots there.

        side: 0 for keys, 1 for values.
        """
        first = i * shape.block
        page = self.table[b, first // shape.page]
        return (page, side, head), lax.rem(first, shape.page) + jnp.arange(shape.block)


def _kernel(
    shape: TritonShape,
    interpret: bool,
    places: Ring | Pages,
    window_ref: Ref,
    scale_ref: Ref,
    q_ref: Ref,
    own: list[Ref],
    leaves: list[list[Ref]],
    *outs: Ref,
) -> None:
    """Attend from the queries of one head to one split of one sequence's cached slots.

    The first split attends to this pass's own tokens too, if they are given. Writes the output and,
    for pages, its log-sum-exp; with several splits, a partial output and its log-sum-exp.

    own: k, v [B, T, K, H] of this pass, or none.
    leaves: the arrays of keys and of values, from `_arrays`; for pages the same ones twice.
    """
    # Row blocks of the same slots are neighbours: all but one of them read from the L2 cache.
    split, row_block = pl.program_id(0) // shape.row_blocks, pl.program_id(0) % shape.row_blocks
    head, b = pl.program_id(1), pl.program_id(2)
    window = window_ref[...]
    written = places.written(b, shape)
    low = jnp.maximum(written - window + 1, 0)  # the first token that query 0 sees
    length = jnp.maximum(written - low, 0)
    begin = places.slot(low, b, shape)

    row = row_block * shape.rows + jnp.arange(shape.rows)
    t = row // shape.groups
    place = t * shape.heads + head * shape.groups + row % shape.groups
    real = t < shape.tokens
    factor = plt.load(scale_ref.at[b, t], mask=real, other=0) * LOG2E
    rows = Queries(place, t, real, factor, written + t - window + 1 - low)
    q = [plt.load(q_ref.at[b, *at], mask=m, other=0) for at, m in _plane_places(shape, rows)]
    total_q = _sum([jnp.sum(x.astype(jnp.float32), 1) for x in q])

    dot = functools.partial(_dot, interpret)

    def step(i: jax.Array, state: Partial, masked: bool) -> Partial:
        """Add block i of cached keys and values to the running softmax.

        masked: whether some query may not see some slot of the block.
        """
        slot = i * shape.block + jnp.arange(shape.block)
        mask = seen = None
        if masked:
            rank = _rank(slot, begin, shape)
            mask = rank < length
            seen = mask[None, :] & (rank[None, :] >= rows.skip[:, None])
        keys, values = (
            _load(shape, leaf, *places.block(i, b, head, side, shape), mask)
            for side, leaf in enumerate(leaves)
        )
        (key, *key_scales), (value, *value_scales) = keys, values
        parts = [_plane(shape, key, c, x.dtype, interpret) for c, x in enumerate(q)]
        s = _sum([dot(x, part.T) for x, part in zip(q, parts, strict=True)])
        if key_scales:
            s *= key_scales[0][None, :]
        if len(key_scales) == 2:
            s += total_q[:, None] * key_scales[1][None, :]
        s *= rows.factor[:, None]
        s = s if seen is None else jnp.where(seen, s, MASKED)
        largest = jnp.maximum(state.largest, jnp.max(s, 1))
        decay = jnp.exp2(state.largest - largest)[:, None]
        p = jnp.exp2(s - largest[:, None])
        total, zeros = state.total * decay + p, state.zeros
        if len(value_scales) == 2:
            zeros = zeros * decay + p * value_scales[1][None, :]
        if value_scales:
            p *= value_scales[0][None, :]
        # A share times the scale of a token may be too small for float16.
        p = p.astype(jnp.bfloat16 if value_scales and q[0].dtype == jnp.float16 else q[0].dtype)
        parts = [_plane(shape, value, c, p.dtype, interpret) for c in range(shape.planes)]
        o = [x * decay + dot(p, part) for x, part in zip(state.o, parts, strict=True)]
        return Partial(largest, total, zeros, tuple(o))

    state = _own(shape, dot, split, (b, head), written, window, q, rows, own)
    state = _blocks(shape, split, begin, length, window, written - low, step, state)
    total = jnp.sum(state.total, 1)
    empty = total == 0
    zeros = jnp.sum(state.zeros, 1)[:, None]
    for (at, mask), o in zip(_plane_places(shape, rows), state.o, strict=True):
        o = (o + zeros) / jnp.where(empty, 1, total)[:, None]
        where = (b, *at) if shape.splits == 1 else (b, at[0], split, at[1])
        plt.store(outs[0].at[where], o.astype(outs[0].dtype), mask=mask)
    lse = state.largest + jnp.log2(jnp.where(empty, 1, total))
    if shape.splits > 1:
        plt.store(outs[1].at[b, rows.place, split], jnp.where(empty, LOWEST, lse), mask=real)
    elif shape.page:
        plt.store(outs[1].at[b, rows.place], jnp.where(empty, -jnp.inf, lse / LOG2E), mask=real)


def _plane_places(
    shape: TritonShape, rows: Queries
) -> list[tuple[tuple[jax.Array, jax.Array], jax.Array]]:
    """Return, for each plane, the indices in q of a program's queries and columns, and a mask.

    The mask is False for padding. Indices and mask are [rows, width].
    """
    places = []
    for plane in range(shape.planes):
        column = jnp.arange(shape.width) * shape.planes + plane
        mask = rows.real[:, None] & (column < shape.dim)[None, :]
        places.append((_area(rows.place, column), mask))
    return places


def _area(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return indices, [rows, columns] each, of a block of an array's last two axes.

    Unlike slices they may exceed the array.
    """
    area = (row.size, column.size)
    return jnp.broadcast_to(row[:, None], area), jnp.broadcast_to(column[None, :], area)


def _rank(slot: jax.Array, begin: jax.Array, shape: TritonShape) -> jax.Array:
    """Return how far each slot lies behind slot `begin` on the ring; slots beyond S rank last."""
    rank = jnp.where(slot < begin, slot - begin + shape.slots, slot - begin)
    if shape.slots % shape.block:
        rank = jnp.where(slot < shape.slots, rank, shape.slots)
    return rank


def _blocks(
    shape: TritonShape,
    split: jax.Array,
    begin: jax.Array,
    length: jax.Array,
    window: jax.Array,
    seen: jax.Array,
    step: Callable[[jax.Array, Partial, bool], Partial],
    state: Partial,
) -> Partial:
    """Add a split's share of the visible blocks of slots to its running softmax.

    split: the index of the split.
    begin: the first slot that query 0 sees.
    length: the number of slots that query 0 sees, from `begin` on around the ring.
    window: the number of tokens that a query sees, its own included.
    seen: the same number as `length`, but below 0 where the first query is padding.
    step: `step(block, state, masked)` adds one block to the softmax `state`.

    Blocks are numbered along the ring. A run of them that all queries see whole takes a path
    without a mask.
    """
    block, slots = shape.block, shape.slots
    ring = pl.cdiv(slots, block)
    head = begin // block
    last = begin + length - 1  # a slot, or slots more
    wrapped = jnp.minimum(ring - head + (last - slots) // block + 1, ring)
    count = jnp.where(last < slots, last // block - head + 1, wrapped)
    count = jnp.where(length > 0, count, 0)
    low, high = split * count // shape.splits, (split + 1) * count // shape.splits

    def walk(
        first: jax.Array,
        after: jax.Array,
        number: Callable[[jax.Array], jax.Array],
        masked: bool,
        state: Partial,
    ) -> Partial:
        def body(j: jax.Array, state: Partial) -> Partial:
            i = head + number(j)
            return step(jnp.where(i >= ring, i - ring, i), state, masked)

        return lax.fori_loop(first, after, body, state)

    if slots % block:  # a block in the middle of the walk is not full, and the next ones shift
        return walk(low, high, lambda j: j, True, state)
    skip = jnp.maximum(seen + shape.tokens - window, 0)  # tokens that the last query does not see
    offset = begin - head * block
    first = jnp.clip(pl.cdiv(skip + offset, block), low, high)
    after = jnp.clip((length + offset) // block, first, high)
    state = walk(first, after, lambda j: j, False, state)
    edges = high - after + first
    return walk(low, edges, lambda j: jnp.where(j < first, j, j - first + after), True, state)


def _load(
    shape: TritonShape,
    leaf: list[Ref],
    where: tuple[jax.Array, ...],
    slot: jax.Array,
    mask: jax.Array | None,
) -> list[jax.Array]:
    """Load a block of cached keys or values, [block, width], and the scale and zero of each slot.

    leaf: the arrays from `_arrays`; without a scale and zero, none is returned.
    where: the indices of the sequence and of the head.
    slot: [block], the indices of the slots.
    mask: bool [block] or None. Slots outside it give 0, as their contents may not be finite.
    """
    column = jnp.arange(shape.width)
    tile_mask = None if mask is None else mask[:, None]
    if shape.width * shape.planes != shape.dim:
        inside = (column < shape.dim // shape.planes)[None, :]
        tile_mask = inside if tile_mask is None else tile_mask & inside
    if tile_mask is not None:
        tile_mask = jnp.broadcast_to(tile_mask, (shape.block, shape.width))
    tile = _read(leaf[0].at[*where, *_area(slot, column)], tile_mask)
    return [tile, *(_read(x.at[*where, slot], mask) for x in leaf[1:])]


def _read(ref: Ref, mask: jax.Array | None) -> jax.Array:
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=0)


def _plane(
    shape: TritonShape, tile: jax.Array, plane: int, dtype: DTypeLike, interpret: bool
) -> jax.Array:
    """Return one plane of a block in the cache as `dtype`: the block, or one int8 of each pair.

    tile: [block, width], floats in one plane, or int16, each a pair of int8, in two.
    plane: the index of the plane.
    """
    if shape.planes == 1:
        return tile
    if interpret or dtype == jnp.float32:
        byte = (tile if plane else tile << 8) >> 8
        return byte.astype(dtype)
    [wide] = plt.elementwise_inline_asm(
        _asm(plane, dtype),
        args=[tile],
        constraints="=r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(tile.shape, dtype)],
    )
    return wide


def _asm(plane: int, dtype: DTypeLike) -> str:
    """Return PTX that converts the int8 in byte `plane` of two pairs to two 16-bit floats.

    The bits of an int8 become the mantissa of a large number, from which another is subtracted,
    which is much faster than the conversion instruction. float16: 1024 + (x + 128) less 1152. A
    bfloat16 mantissa has 7 bits: 128 + (x mod 128), less 128, or less 256 where x is negative.
    """
    source = "shr.u32 x, $1, 8;" if plane else "mov.b32 x, $1;"
    if dtype == jnp.float16:
        rest = (
            "lop3.b32 y, x, 0x00ff00ff, 0x64806480, 0x6a; mov.b32 z, 0x64806480;"
            "sub.rn.f16x2 $0, y, z;"
        )
    else:
        rest = (
            "lop3.b32 y, x, 0x007f007f, 0x43004300, 0xea;"
            "lop3.b32 z, x, 0x00800080, 0x43004300, 0xea;"
            "mov.b32 x, 0xbf80bf80; fma.rn.bf16x2 $0, z, x, y;"
        )
    return f"{{ .reg .b32 x, y, z; {source} {rest} }}"


def _sum(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _dot(interpret: bool, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply x by y in float32, which takes tensor cores three products if x is float32."""
    precision: Any = lax.Precision.DEFAULT
    if x.dtype == jnp.float32:
        precise = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = lax.Precision.HIGHEST if interpret else precise
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def _own(
    shape: TritonShape,
    dot: Callable[[jax.Array, jax.Array], jax.Array],
    split: jax.Array,
    where: tuple[jax.Array, jax.Array],
    written: jax.Array,
    window: jax.Array,
    q: list[jax.Array],
    rows: Queries,
    own: list[Ref],
) -> Partial:
    """Start a program's running softmax, empty but in split 0, where it has this pass's tokens.

    dot: multiplies two matrices in float32.
    where: the indices of the sequence and of the key/value head.
    written: the number of the sequence's written tokens, below 0 for padding.
    q: the planes of the program's queries, [rows, width] each.
    own: k, v [B, T, K, H] of this pass; none leaves split 0 empty, too.
    """
    b, head = where
    if not own:
        nothing = jnp.zeros((shape.rows, shape.block), jnp.float32)
        o = jnp.zeros((shape.rows, shape.width), jnp.float32)
        largest = jnp.full((shape.rows,), LOWEST, jnp.float32)
        return Partial(largest, nothing, nothing, (o,) * shape.planes)
    k_ref, v_ref = own
    count = max(pl.next_power_of_2(shape.tokens), _ROWS[0])
    u = jnp.arange(count)
    held = (u < shape.tokens) & (written + u >= 0) & (split == 0)
    distance = rows.t[:, None] - u[None, :]
    seen = held[None, :] & (distance >= 0) & (distance < window)

    def read(ref: Ref, plane: int) -> jax.Array:
        column = jnp.arange(shape.width) * shape.planes + plane
        token, column_of = _area(u, column)
        mask = held[:, None] & (column < shape.dim)[None, :]
        return plt.load(ref.at[b, token, head, column_of], mask=mask, other=0)

    s = _sum([dot(x, read(k_ref, plane).T) for plane, x in enumerate(q)])
    s = jnp.where(seen, s * rows.factor[:, None], MASKED)
    largest = jnp.maximum(jnp.max(s, 1), LOWEST)
    p = jnp.exp2(s - largest[:, None])
    first = jnp.arange(shape.block)[None, :] == 0
    total = jnp.where(first, jnp.sum(p, 1)[:, None], 0)
    o = [dot(p.astype(q[0].dtype), read(v_ref, plane)) for plane in range(shape.planes)]
    return Partial(largest, total, jnp.zeros_like(total), tuple(o))


def _merge(shape: TritonShape, columns: int, o_ref: Ref, lse_ref: Ref, *outs: Ref) -> None:
    """Merge the splits of one query into one softmax, for some columns of its output.

    columns: the number of columns.
    o_ref, lse_ref: the partial outputs [B, T N, splits, H], and their log-sum-exp.
    outs: o [B, T N, H] and, for pages, the log-sum-exp [B, T N].
    """
    b, place = pl.program_id(2), pl.program_id(1)
    column = pl.program_id(0) * columns + jnp.arange(columns)
    split = jnp.arange(pl.next_power_of_2(shape.splits))
    real, inside = split < shape.splits, column < shape.dim
    lse = plt.load(lse_ref.at[b, place, split], mask=real, other=LOWEST)
    at = (b, place, *_area(split, column))
    parts = plt.load(o_ref.at[at], mask=real[:, None] & inside[None, :], other=0)
    # Where no split has seen a key, the shares are arbitrary and all parts are 0.
    largest = jnp.max(lse, 0)
    shares = jnp.exp2(lse - largest)
    total = jnp.sum(shares, 0)
    o = jnp.sum(parts * shares[:, None], 0) / total
    plt.store(outs[0].at[b, place, column], o.astype(outs[0].dtype), mask=inside)
    for out in outs[1:]:  # the programs of all columns write the same number
        value = (largest + jnp.log2(total)) / LOG2E
        plt.store(out.at[b, place], jnp.where(largest == LOWEST, -jnp.inf, value))
