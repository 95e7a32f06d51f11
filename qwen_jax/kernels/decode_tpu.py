"""Attention from a few query tokens to a KV cache, for TPUs (Pallas, Mosaic).

A decode step takes as long as reading the cache does, so a block of keys or values goes from HBM to
a matrix unit unchanged, as the stationary operand, and is read once for all queries of its head. A
grid step handles one block of slots of one sequence for several heads. The list of grid steps is
computed beforehand from scalars, and holds the blocks that a sequence sees, so slots not written or
beyond the window are never copied.

The cache is a ring of slots for each sequence (`tpu_decode`), or pages of a pool, which a table
assigns to sequences (`tpu_paged_decode`). Both are one kernel, with other copies into VMEM.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
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
    pad,
    round_up,
)

NAME = "decode_tpu"
FAMILY = "pallas_tpu"  # its name in the table of measured lines
DTYPES = ("bfloat16", "float32")
# XLA keeps narrower heads without padding to 128 lanes, and would copy the pool at every call.
PAGED_HEAD_DIMS = (128, 256)
_LANES, _SUBLANES = 128, 8
_HEADS = 16  # heads in a grid step: some are in the softmax while the matrix units load others
# Bytes of keys in a grid step. The most is what fits. The least keeps the step's bookkeeping hidden
# behind its copies, where a short ring asks for smaller blocks that read less beyond a row's ends.
_MOST_BYTES, _LEAST_BYTES = 2**21, 2**20
_SCORES = 2**15  # scores of a pack: half of the registers


class TpuShape(NamedTuple):
    """The sizes by which the decode kernel divides its work.

    heads: key/value heads in a grid step.
    rows: queries of one key/value head (T G), padded.
    packed: heads whose queries share the sublanes of a register, called a pack.
    packs: packs in a grid step.
    block: cache slots in a grid step.
    slots, tokens, groups: S (cache slots), T (query tokens) and G (query heads per key/value head).
    """

    heads: int
    rows: int
    packed: int
    packs: int
    block: int
    slots: int
    tokens: int
    groups: int

    @property
    def pack_rows(self) -> int:
        """The number of matrix rows of a pack: its heads' queries, padded to a register."""
        return max(_SUBLANES, self.packed * self.rows)


def tpu_decode(
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
    block: cache slots in a grid step; None takes a measured number, or chooses one.

    Returns o [B, T, N, H] in q's dtype. Raises NotImplementedError for a dtype, head dim or device
    that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "tpu") if interpret is None else interpret
    values = cache_k.values if isinstance(cache_k, Quantised) else cache_k
    decline(NAME, q, k=k, dtypes=DTYPES, head_dims=HEAD_DIMS)
    tokens, num_heads, dim = q.shape[1:]
    kv_heads, slots = values.shape[1:3]
    sizes = choice.blocks(FAMILY, "decode", head_dim=dim, dtype=values.dtype.name, length=slots)
    block = block or sizes.get("block")
    shape = _shape(tokens, num_heads // kv_heads, kv_heads, slots, dim, values.dtype, block)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    leaves = [_arrays(leaf) for leaf in (cache_k, cache_v)]

    written = index - start
    plan, steps = _plan(shape, start.astype(jnp.int32) % slots, written, window, scale)

    def cached(group: jax.Array, step: jax.Array, plan: Plan) -> tuple[Any, ...]:
        copied = plan.copied[step]
        return copied >> _bits(shape), group, copied & _low(shape)

    def cached_values(*args: Any) -> tuple[Any, ...]:
        return *cached(*args), 0

    values_spec = pl.BlockSpec((None, shape.heads, shape.block, dim), cached_values)
    scales_spec = pl.BlockSpec((None, shape.heads, shape.block), cached)
    specs = [[values_spec] + [scales_spec] * (len(leaf) - 1) for leaf in leaves]
    (o,) = _call(shape, plan, steps, q, [k, v], leaves, specs, interpret)
    return o


def tpu_paged_decode(
    q: Float[Array, "B T N H"],
    kv: PoolLeaf,
    table: Int[Array, "B W"],
    written: Int[Array, " B"],
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
    *,
    interpret: bool | None = None,
    block: int | None = None,
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
    block: slots in a grid step, whole pages; None chooses a number.

    Returns o [B, T, N, H] and the log-sum-exp of the scores [B, T, N], in float32: 0 and -inf for a
    query that sees no key. Raises NotImplementedError for a dtype, head dim, page size or device
    that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "tpu") if interpret is None else interpret
    leaf = _arrays(kv)
    decline(f"{NAME}, pages", q, k=kv, dtypes=DTYPES, head_dims=PAGED_HEAD_DIMS)
    # Whole registers of a page, and of a block's scores.
    decline_page(NAME, kv, multiple=32 // leaf[0].dtype.itemsize, lanes=_LANES)
    tokens, num_heads, dim = q.shape[1:]
    kv_heads, page = kv.shape[2:4]
    slots = page * table.shape[1]
    shape = _shape(tokens, num_heads // kv_heads, kv_heads, slots, dim, leaf[0].dtype, block)
    shape = shape._replace(block=round_up(shape.block, page))
    many = shape.block // page  # pages in a block
    width = round_up(table.shape[1], many)
    plan, steps = _plan(shape, jnp.zeros_like(written), written, window, scale)
    plan = plan._replace(table=pad(table.astype(jnp.int32), width, axis=1).reshape(-1))

    def page_spec(array: jax.Array, i: int) -> pl.BlockSpec:
        def index(group: jax.Array, step: jax.Array, plan: Plan) -> tuple[Any, ...]:
            assert plan.table is not None
            copied = plan.copied[step]
            entry = (copied >> _bits(shape)) * width + (copied & _low(shape)) * many + i
            return (plan.table[entry], 0, group, 0, 0)[: array.ndim]

        return pl.BlockSpec((None, 2, shape.heads, *array.shape[3:]), index)

    leaves = [[array] * many for array in leaf]
    specs = [[page_spec(array, i) for i in range(many)] for array in leaf]
    o, lse = _call(shape, plan, steps, q, None, leaves, specs, interpret)
    return o, lse[..., 0]


class Plan(NamedTuple):
    """The scalars by which the decode kernel walks over the cache.

    work, copied: the grid steps of `_steps`; only index maps use `copied`.
    first, written: int32 [B], the slot of each sequence's token 0, and its written tokens.
    window: int32 [1].
    scale: float32 [B, T], the factor on each query's scores.
    table: int32 [B * pages], the pages of each sequence, for index maps; None without pages.
    """

    work: Ref
    copied: Ref
    first: Ref
    written: Ref
    window: Ref
    scale: Ref
    table: Ref | None = None


def _plan(
    shape: TpuShape, first: jax.Array, written: jax.Array, window: jax.Array, scale: jax.Array
) -> tuple[Plan, jax.Array]:
    """Return the fields of `Plan`, and the number of grid steps.

    first, written: int32 [B], as in `Plan`.
    window: int32 [].
    scale: float32 [B, T].
    """
    first, written, window = (jnp.asarray(x, jnp.int32) for x in (first, written, window))
    work, copied, steps = _steps(first, written, window, shape)
    return Plan(work, copied, first, written, window[None], scale.astype(jnp.float32)), steps


def _call(
    shape: TpuShape,
    plan: Plan,
    steps: jax.Array,
    q: jax.Array,
    own: list[jax.Array] | None,
    leaves: list[list[jax.Array]],
    leaf_specs: list[list[pl.BlockSpec]],
    interpret: bool,
) -> list[jax.Array]:
    """Run the kernel.

    own: k, v [B, T, K, H] of this pass; None for a cache in pages, without this pass's tokens.
    leaves, leaf_specs: the arrays of the cache, and how a grid step's blocks are copied.

    Returns o [B, T, N, H] in q's dtype or, for pages, o in float32, and the log-sum-exp in all
    elements of [B, T, N, 128].
    """
    batch, tokens, num_heads, dim = q.shape
    kv_heads = num_heads // shape.groups
    # [B, T, N, H] -> [B, K rows, H]: the rows of a head are its T G queries and padding.
    queries = jnp.swapaxes(q.reshape(batch, tokens, kv_heads, -1, dim), 1, 2)
    queries = pad(queries.reshape(batch, kv_heads, -1, dim), shape.rows, axis=2)
    blocks = kv_heads // shape.heads
    block_rows = shape.packs * shape.pack_rows
    queries = pad(queries.reshape(batch, -1, dim), blocks * block_rows, axis=1)

    def of_row(group: jax.Array, step: jax.Array, plan: Plan) -> tuple[Any, ...]:
        return plan.work[step] >> _bits(shape), group, 0

    def of_own(group: jax.Array, step: jax.Array, plan: Plan) -> tuple[Any, ...]:
        return plan.work[step] >> _bits(shape), 0, group, 0

    rows_spec = pl.BlockSpec((None, block_rows, dim), of_row)
    own_spec = pl.BlockSpec((None, tokens, shape.heads, dim), of_own)
    out_specs = [rows_spec]
    out_shape = [jax.ShapeDtypeStruct(queries.shape, q.dtype)]
    if own is None:
        out_specs = [rows_spec, pl.BlockSpec((None, block_rows, _LANES), of_row)]
        sizes = (queries.shape, (*queries.shape[:2], _LANES))
        out_shape = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    state = (shape.packs, shape.pack_rows, _LANES)
    outs = pl.pallas_call(
        functools.partial(_kernel, shape),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[rows_spec, own and [own_spec] * 2, leaf_specs],
            out_specs=out_specs,
            scratch_shapes=[
                *[pltpu.VMEM(state, jnp.float32)] * 4,
                pltpu.VMEM((shape.packs, shape.pack_rows, dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=NAME,
    )(plan, queries, own, leaves)

    def by_token(x: jax.Array) -> jax.Array:  # the inverse
        x = x[:, : kv_heads * shape.rows].reshape(batch, kv_heads, shape.rows, -1)
        x = x[:, :, : tokens * shape.groups].reshape(batch, kv_heads, tokens, shape.groups, -1)
        return jnp.swapaxes(x, 1, 2).reshape(batch, tokens, num_heads, -1)

    return [by_token(x) for x in outs]


def _arrays(leaf: CacheLeaf | PoolLeaf) -> list[jax.Array]:
    """Return a cache leaf's arrays: values and, if it is quantised, scale and zero (if any)."""
    if not isinstance(leaf, Quantised):
        return [leaf]
    return [x for x in (leaf.values, leaf.scale, leaf.zero) if x is not None]


def _shape(
    tokens: int,
    groups: int,
    kv_heads: int,
    slots: int,
    dim: int,
    dtype: np.dtype,
    block: int | None,
) -> TpuShape:
    """Choose the sizes by which the decode kernel divides its work.

    tokens, groups, slots, dim: T, G, S and H.
    dtype: the dtype of the cached values.
    block: cache slots in a grid step; None chooses a number.
    """
    rows = tokens * groups
    rows = 1 << (rows - 1).bit_length() if rows < _SUBLANES else round_up(rows, _SUBLANES)
    packed = max(1, _SUBLANES // rows)
    heads = kv_heads  # or a divisor, so that a chip's two cores share the work
    if kv_heads % _SUBLANES == 0:
        heads = _HEADS if kv_heads % _HEADS == 0 and kv_heads > _HEADS else _SUBLANES
    if block is None:
        slot_bytes = heads * round_up(dim, _LANES) * dtype.itemsize
        short = max(slots // 4, _LEAST_BYTES // slot_bytes)
        room = min(_MOST_BYTES // slot_bytes, short, _SCORES // (packed * rows))
        block = next((n for n in (1024, 512, 256) if n <= room), _LANES)
    block = min(block, round_up(slots, _LANES))
    return TpuShape(heads, rows, packed, -(-heads // packed), block, slots, tokens, groups)


def _bits(shape: TpuShape) -> int:
    """Return how many low bits of a packed grid step hold its block's index.

    The other bits hold the index of its sequence.
    """
    return max(1, (-(-shape.slots // shape.block) - 1).bit_length())


def _low(shape: TpuShape) -> int:
    """Return the bit mask of the block's index in a packed grid step."""
    return (1 << _bits(shape)) - 1


def _steps(
    first: jax.Array, written: jax.Array, window: jax.Array, shape: TpuShape
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List the grid steps: the blocks of cache slots that each sequence sees.

    first: int32 [B], the slot of each sequence's token 0.
    written: int32 [B], the number of its written tokens.
    window: int32 [], the number of tokens that a query sees.

    Returns the steps as they are visited, the steps whose blocks are copied, int32 [B * blocks]
    each, and the number of steps. A step is the indices of a sequence and of a block, packed in one
    integer. A sequence that sees no slot has one step, for which the block before stays in memory.
    """
    slots, block, bits = shape.slots, shape.block, _bits(shape)
    blocks = -(-slots // block)
    low = jnp.maximum(written - window + 1, 0)
    length = jnp.maximum(written - low, 0)
    begin = (first + low) % slots
    end = begin + length - 1  # the last slot, or slots more
    wrapped = jnp.minimum(blocks - begin // block + (end - slots) // block + 1, blocks)
    count = jnp.where(end >= slots, wrapped, end // block - begin // block + 1)
    count = jnp.where(length > 0, count, 0)
    ends = jnp.cumsum(jnp.maximum(count, 1))
    step = jnp.arange(first.shape[0] * blocks, dtype=jnp.int32)
    row = jnp.sum(step[:, None] >= ends, 1, dtype=jnp.int32)
    row = jnp.minimum(row, first.shape[0] - 1)
    before = ends[row] - jnp.maximum(count, 1)[row]
    work = row << bits | (begin[row] // block + step - before) % blocks
    copied = work[lax.cummax(jnp.where(count[row] > 0, step, 0))]
    return work, copied, ends[-1]


class Scratch(NamedTuple):
    """The online softmax of a sequence's queries: float32 [packs, pack rows, lanes] but for `out`.

    A pack is the queries of some key/value heads, which one matrix product takes.

    scale: the factor on a query's scores, times log2(e), as exponentials are powers of 2.
    largest: the largest score so far, equal in all lanes.
    total: the sum of exponentials, as a partial sum in each lane.
    zero: the sum of exponentials times the zero points of 8-bit values, as `total`.
    out: the output before division by the total, [packs, pack rows, H].
    """

    scale: Ref
    largest: Ref
    total: Ref
    zero: Ref
    out: Ref


class _Joined:
    """A block of keys or of values that lies in several pages, indexed like one array.

    pages: the pages' keys and values, [2, heads, page, H], or scales, [2, heads, page].
    side: 0 for keys, 1 for values.
    """

    def __init__(self, pages: list[Ref], side: int) -> None:
        self.pages, self.side = pages, side

    def __getitem__(self, heads: int | slice) -> jax.Array:
        """Load values of one head [block, H], or scales of several [heads, block]."""
        parts = [page[self.side, heads] for page in self.pages]
        return jnp.concatenate(parts, 0 if isinstance(heads, int) else -1)


def _kernel(
    shape: TpuShape,
    plan: Plan,
    q: Ref,
    own: list[Ref] | None,
    leaves: list[list[Ref]],
    *outs_and_scratch: Ref,
) -> None:
    """Add a block of cached keys and values to one sequence's running softmax, for several heads.

    The first step of a sequence starts its softmax with this pass's own tokens, if there are any,
    and its last step writes the outputs.

    q: [packs * pack rows, H], the queries of these heads.
    own: k, v [T, heads, H] of this pass, or None for a cache in pages.
    leaves: the arrays of the block's keys, and of its values; or for values, and for scales, their
        pages, with both.
    outs_and_scratch: o like q, for pages the log-sum-exp [packs * pack rows, 128] too, and the
        fields of `Scratch`.
    """
    fields = len(Scratch._fields)
    outs, state = outs_and_scratch[:-fields], Scratch(*outs_and_scratch[-fields:])
    if own is None:
        leaves = [[_Joined(pages, side) for pages in leaves] for side in (0, 1)]
    work, written = plan.work, plan.written
    step, steps, bits = pl.program_id(1), pl.num_programs(1), _bits(shape)
    row = work[step] >> bits
    tokens = written[row]
    slots = _Slots(
        (work[step] & _low(shape)) * shape.block, plan.first[row], tokens, plan.window[0]
    )

    @pl.when((step == 0) | (work[jnp.maximum(step - 1, 0)] >> bits != row))
    def _() -> None:
        scales = [plan.scale[row, t] for t in range(shape.tokens)]
        _begin(shape, slots, scales, q, own, state)

    seen = (tokens > 0) & (slots.oldest < tokens)
    full = slots.full(shape)

    @pl.when(seen & full)
    def _() -> None:
        _block(shape, None, q, leaves, state)

    @pl.when(seen & jnp.logical_not(full))
    def _() -> None:
        _block(shape, slots, q, leaves, state)

    @pl.when((step == steps - 1) | (work[jnp.minimum(step + 1, steps - 1)] >> bits != row))
    def _() -> None:
        for pack in range(shape.packs):
            total = jnp.sum(state.total[pack], -1, keepdims=True)
            out = state.out[pack] + jnp.sum(state.zero[pack], -1, keepdims=True)
            divisor = jnp.where(total > 0, total, 1)
            outs[0][_rows(shape, pack)] = (out / divisor).astype(outs[0].dtype)
            for lse in outs[1:]:
                value = (state.largest[pack] + jnp.log2(divisor)) / LOG2E
                lse[_rows(shape, pack)] = jnp.where(total > 0, value, -jnp.inf)


class _Slots(NamedTuple):
    """A block of one sequence's cache slots, with all that decides which of them a query sees.

    slot: the index of the block's first slot.
    first: the slot of the sequence's token 0.
    tokens: the number of its written tokens.
    window: the number of tokens that a query sees, its own included.
    """

    slot: jax.Array
    first: jax.Array
    tokens: jax.Array
    window: jax.Array

    @property
    def oldest(self) -> jax.Array:
        """The position of the oldest token in query 0's window, at most 0 if it sees all tokens.

        Query t's oldest token is t later.
        """
        return self.tokens - self.window + 1

    def full(self, shape: TpuShape) -> jax.Array:
        """Return whether every query sees every slot of the block."""
        head = self._token(self.slot, shape)
        tail = head + shape.block - 1  # the last slot's, unless the ring begins anew before it
        seen = (tail < self.tokens) & (head >= self.oldest + shape.tokens - 1)
        return seen & (tail < shape.slots) & (self.slot + shape.block <= shape.slots)

    def seen(
        self, shape: TpuShape, size: tuple[int, int], axis: int, query: jax.Array | int
    ) -> jax.Array:
        """Return whether a query sees each slot of the block, as bool of shape `size`.

        axis: the axis of the result along which slots lie.
        query: the query's token t, a number or an array of shape `size`.
        """
        slot = self.slot + lax.broadcasted_iota(jnp.int32, size, axis)
        token = self._token(slot, shape)
        return (slot < shape.slots) & (token < self.tokens) & (token >= self.oldest + query)

    def _token(self, slot: jax.Array, shape: TpuShape) -> jax.Array:
        """Return the position of the token that lies in a slot."""
        return jnp.where(slot < self.first, slot + shape.slots, slot) - self.first


def _rows(shape: TpuShape, pack: int) -> slice:
    """Return the slice of a pack's rows in the kernel's queries and output.

    pack: the index of the pack.
    """
    return slice(pack * shape.pack_rows, (pack + 1) * shape.pack_rows)


def _row(shape: TpuShape, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the index of the head within its pack, and of the query token, of each row of a pack.

    size: the shape of both results; the rows of the pack lie along axis 0.
    """
    row = lax.broadcasted_iota(jnp.int32, size, 0)
    return row // shape.rows, row % shape.rows // shape.groups


def _dot(x: jax.Array, y: jax.Array, contract: int) -> jax.Array:
    """Multiply x [rows, X] by y in float32, summing over X, the axis `contract` of y."""
    if 1 in y.shape:  # Mosaic multiplies with a vector without its matrix units, in float32 only
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if y.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _begin(
    shape: TpuShape,
    slots: _Slots,
    scales: list[jax.Array],
    q: Ref,
    own: list[Ref] | None,
    state: Scratch,
) -> None:
    """Start a sequence's running softmax with the keys and values of this pass's own tokens.

    scales: the factor on the scores of each query token.
    q: [packs * pack rows, H].
    own: k, v [T, heads, H]; None starts with no key.
    """
    size = (shape.pack_rows, shape.heads)
    head, query = _row(shape, size)
    key_head = lax.broadcasted_iota(jnp.int32, size, 1)
    lanes = (shape.pack_rows, _LANES)
    _, token = _row(shape, lanes)
    scale = jnp.zeros(lanes, jnp.float32)
    for t, value in enumerate(scales):
        scale = jnp.where(token == t, value * LOG2E, scale)
    if own is None:
        for pack in range(shape.packs):
            state.scale[pack] = scale
            state.largest[pack] = jnp.full(lanes, LOWEST, jnp.float32)
            state.total[pack] = jnp.zeros(lanes, jnp.float32)
            state.zero[pack] = jnp.zeros(lanes, jnp.float32)
            state.out[pack] = jnp.zeros((shape.pack_rows, q.shape[1]), jnp.float32)
        return
    k, v = own

    def score(pack: int, u: int) -> jax.Array:
        s = _dot(q[_rows(shape, pack)], k[u], 1) * scale[:, :1]
        near = (query >= u) & (query - u < slots.window) & (slots.tokens + u >= 0)
        return jnp.where(near & (key_head == head + pack * shape.packed), s, MASKED)

    # All packs go through each stage together, as every stage ends in a wait.
    scores = [[score(pack, u) for u in range(shape.tokens)] for pack in range(shape.packs)]
    for pack, parts in enumerate(scores):
        largest = jnp.max(functools.reduce(jnp.maximum, parts), -1, keepdims=True)
        largest = jnp.maximum(largest, LOWEST)
        parts = [jnp.exp2(s - largest) for s in parts]
        total = jnp.sum(functools.reduce(jnp.add, parts), -1, keepdims=True)
        out = [_dot(p.astype(q.dtype), v[u], 0) for u, p in enumerate(parts)]
        state.scale[pack] = scale
        state.largest[pack] = jnp.broadcast_to(largest, lanes)
        state.total[pack] = jnp.where(lax.broadcasted_iota(jnp.int32, lanes, 1) == 0, total, 0)
        state.zero[pack] = jnp.zeros(lanes, jnp.float32)
        state.out[pack] = functools.reduce(jnp.add, out)


def _block(
    shape: TpuShape, slots: _Slots | None, q: Ref, leaves: list[list[Ref]], state: Scratch
) -> None:
    """Add one block of cached keys and values to the running softmax of one sequence.

    A head's keys are the stationary operand for all rows of its pack, and only the scores of the
    head's own rows are kept, so a pack fills whole registers. The next pack's scores are computed
    before the softmax of this one.

    slots: None if every query sees every slot of the block.
    leaves: the arrays of the block's keys, and of its values.
    """
    (keys, *key_scales), (values, *value_scales) = leaves
    size = (shape.pack_rows, shape.block)
    head, _ = _row(shape, (shape.pack_rows, 1))
    seen = real = None
    if slots is not None:
        seen = slots.seen(shape, size, 1, _row(shape, size)[1])
        real = slots.seen(shape, (shape.block, q.shape[1]), 0, 0)

    def heads(pack: int) -> range:
        return range(pack * shape.packed, min((pack + 1) * shape.packed, shape.heads))

    def by_row(pack: int, x: Ref) -> jax.Array:  # [heads, block] -> [pack rows, block]
        if len(heads(pack)) == shape.pack_rows:
            return x[heads(pack).start : heads(pack).stop]
        return _select(head, [jnp.broadcast_to(x[h : h + 1], size) for h in heads(pack)])

    def score(pack: int) -> jax.Array:
        rows = q[_rows(shape, pack)]
        s = _select(head, [_dot(rows, keys[h].astype(q.dtype), 1) for h in heads(pack)])
        if key_scales:
            s *= by_row(pack, key_scales[0])
        if len(key_scales) == 2:
            total = jnp.sum(rows.astype(jnp.float32), -1, keepdims=True)
            s += total * by_row(pack, key_scales[1])
        s *= state.scale[pack][:, :1]
        return s if seen is None else jnp.where(seen, s, MASKED)

    def real_value(h: int) -> jax.Array:
        # A slot that was never written may hold NaN, which a weight of 0 does not cancel.
        value = values[h].astype(q.dtype)
        return value if real is None or value_scales else jnp.where(real, value, 0)

    def scaled(pack: int, p: jax.Array, factor: Ref) -> jax.Array:
        p = p * by_row(pack, factor)
        return p if seen is None else jnp.where(seen, p, 0)

    following = score(0)
    for pack in range(shape.packs):
        s = following
        if pack + 1 < shape.packs:
            following = score(pack + 1)
        largest = jnp.maximum(state.largest[pack], jnp.max(s, -1, keepdims=True))
        decay = jnp.exp2(state.largest[pack] - largest)
        p = jnp.exp2(s - largest[:, :1])
        state.largest[pack] = largest
        state.total[pack] = state.total[pack] * decay + _lanes(p)
        if len(value_scales) == 2:
            zero = _lanes(scaled(pack, p, value_scales[1]))
            state.zero[pack] = state.zero[pack] * decay + zero
        if value_scales:
            p = scaled(pack, p, value_scales[0])
        p = p.astype(q.dtype)
        new = _select(head, [_dot(p, real_value(h), 0) for h in heads(pack)])
        state.out[pack] = state.out[pack] * decay[:, :1] + new


def _select(head: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Combine an array for each head into one, with each row taken from its own head's array.

    head: [pack rows, 1], the index of each row's head within its pack.
    parts: [pack rows, X] for each head of the pack.
    """
    result = parts[0]
    for i, part in enumerate(parts[1:], 1):
        result = jnp.where(head == i, part, result)
    return result


def _lanes(x: jax.Array) -> jax.Array:
    """Add up the n parts of x [rows, n * 128] that are 128 lanes wide. Returns [rows, 128]."""
    return functools.reduce(jnp.add, [x[:, i : i + _LANES] for i in range(0, x.shape[1], _LANES)])
