"""Flash attention for TPU, forward and backward, in Pallas Mosaic.

The grid walks a list of (query block, key block) pairs, made from the mask before the kernel
starts, without pairs that the mask hides whole. A block pair is straight-line code, cut along the
keys into pieces small enough that the next piece's scores are computed during the last one's
exponentials; that, and not the order of the source, fills the matrix units.

`tpu_paged_prefill` runs the forward kernel on keys and values in pages, for several heads at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.kernels import choice, flash
from qwen_jax.kernels.flash import Attended, KeysOrValues, PoolLeaf, Ref, Scale
from qwen_jax.kernels.mask import Mask

NAME = "pallas_tpu"
DTYPES = ("bfloat16", "float32", "float16")
# XLA keeps narrower heads without padding to 128 lanes, and would copy the pool at every call.
PAGED_HEAD_DIMS = (128, 256)
# Heads of a grid step at most, as each page is an operand, which costs 60 cycles; and (query, key)
# pairs of all of them, whose straight-line code takes time to compile (2**21: 7 s of a CPU).
_PAGED_HEADS, _PAGED_PAIRS = 4, 2**21
_MOST_PAGES = 16  # operands of a grid step at most
_LANES = 128
_NT = (((1,), (1,)), ((), ()))  # contracts the last axis of both operands
_NN = (((1,), (0,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))  # contracts the first axis of both
# A grid step is packed in an int32: query block, key block, flags and kind of work.
_INDEX_BITS = 13
_FIRST, _LAST = 4, 8  # the first, the last step of an output block
_EMPTY, _FULL, _NEAR, _MIXED = 0, 1, 2, 3  # _NEAR: one segment, so only positions are compared
_SIGN = jnp.iinfo(jnp.int32).min
_Index = Callable[[jax.Array], jax.Array]  # from a packed step, or a head, to an index


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """The block sizes of a kernel, in tokens.

    q, k: tokens in a query block and in a key block.
    compute: keys whose scores are computed at once.
    """

    q: int
    k: int
    compute: int

    def fitted(self, queries: int, keys: int) -> "TpuBlocks":
        """Return sizes that cut `queries` and `keys` evenly, in multiples of 128 lanes."""
        q = _even(queries, self.q)
        k = _even(keys, self.k)
        compute = _even(k, self.compute)
        return TpuBlocks(q, flash.round_up(k, compute), compute)


@dataclasses.dataclass(frozen=True)
class TpuBody:
    """The `flash.Body` for TPUs.

    forward_blocks, backward_blocks: the block sizes of its two kernels.
    resident: the number of queries whose dq VMEM holds at once.
    vmem: the bytes of VMEM that a kernel may use.
    interpret: whether kernels run interpreted.
    """

    forward_blocks: TpuBlocks
    backward_blocks: TpuBlocks
    resident: int
    vmem: int
    interpret: bool = False

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: jax.Array,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute o and the log-sum-exp by a Mosaic kernel, as `flash.Body.forward` says."""
        (_, length, heads, dim), keys = q.shape, k.shape[1]
        blocks = self.forward_blocks.fitted(length, keys)
        padded = flash.round_up(length, blocks.q), flash.round_up(keys, blocks.k)
        mask = flash.padded_mask(mask, queries=padded[0], keys=padded[1])
        q = _heads_first(flash.factored(q, scale), padded[0])
        k, v = _heads_first(k, padded[1]), _heads_first(v, padded[1])
        steps, count = _steps(_kinds(mask, blocks))
        group = heads // k.shape[1]
        by_query, by_key = _index(_query_block), _index(_key_block)
        q_block = pl.BlockSpec((None, None, blocks.q, dim), by_query(lambda h: h))
        k_block = pl.BlockSpec((None, None, blocks.k, dim), by_key(lambda h: h // group))
        o, lse = pl.pallas_call(
            functools.partial(_forward_kernel, compute=blocks.compute),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(q.shape[0], heads, count),
                in_specs=[
                    q_block,
                    k_block,
                    k_block,
                    *[_row_block(blocks.q, _query_block)] * 2,
                    *[_row_block(blocks.k, _key_block)] * 2,
                ],
                out_specs=[q_block, _stat_block(blocks.q)],
                scratch_shapes=[
                    *[pltpu.VMEM((blocks.q, _LANES), jnp.float32)] * 2,
                    pltpu.VMEM((blocks.q, dim), jnp.float32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(q.shape, dtype),
                jax.ShapeDtypeStruct((*q.shape[:2], 1, padded[0]), jnp.float32),
            ],
            compiler_params=_parameters(self.vmem),
            interpret=self.interpret,
            name="flash_forward",
        )(
            steps,
            _one(mask.window),
            q,
            k,
            v,
            *_rows(mask.q_positions, mask.q_segments),
            *_rows(mask.k_positions, _key_segments(mask)),
        )
        return jnp.swapaxes(o, 1, 2)[:, :length], jnp.swapaxes(lse[:, :, 0], 1, 2)[:, :length]

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        do: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute the gradients of q, k and v, as `flash.Body.backward` says."""
        length, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        parts = -(-length // self.resident)
        blocks = self.backward_blocks.fitted(-(-length // parts), keys)
        part = flash.round_up(-(-length // parts), blocks.q)
        mask = flash.padded_mask(mask, queries=parts * part, keys=flash.round_up(keys, blocks.k))
        scaled = flash.factored(q, scale)
        queries = (scaled, do, lse, delta, mask.q_positions, mask.q_segments)

        def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [parts, B, part, ...]
            x = flash.pad(x, parts * part, axis=1)
            return jnp.moveaxis(x.reshape(x.shape[0], parts, part, *x.shape[2:]), 1, 0)

        k, v = (_heads_first(x, mask.k_positions.shape[1]) for x in (k, v))
        one = functools.partial(self._backward_part, k=k, v=v, mask=mask, blocks=blocks)
        if parts == 1:
            dq, dk, dv = one(tuple(flash.pad(x, part, axis=1) for x in queries))
        else:

            def step(
                sums: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]
            ) -> tuple[Any, jax.Array]:
                dq, dk, dv = one(rows)
                return (sums[0] + dk, sums[1] + dv), dq

            zero = jnp.zeros((*scaled.shape[:1], scaled.shape[2], *k.shape[2:]), jnp.float32)
            (dk, dv), dq = jax.lax.scan(step, (zero, zero), tuple(cut(x) for x in queries))
            dq = jnp.moveaxis(dq, 0, 2)
            dq = dq.reshape(*dq.shape[:2], -1, dq.shape[-1])
        dq = jnp.swapaxes(dq, 1, 2)[:, :length] * scale[:, :, None, None]
        dk, dv = (
            jnp.swapaxes(jnp.sum(x.reshape(x.shape[0], -1, group, *x.shape[2:]), 2), 1, 2)
            for x in (dk, dv)
        )
        return dq, dk[:, :keys].astype(q.dtype), dv[:, :keys].astype(q.dtype)

    def _backward_part(
        self,
        rows: tuple[jax.Array, ...],
        *,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        blocks: TpuBlocks,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute the gradients that come from some of the queries.

        rows: these queries' q (as from `flash.factored`), do, lse, delta, positions and segments.
        k, v: [B, K, S, H].
        mask: only its positions and segments of keys, and its window, are used.

        Returns dq, still to be multiplied by scale, and dk, dv of each query head, float32 [B, N,
        T, H] and [B, N, S, H].
        """
        q, do, lse, delta, positions, segments = rows
        mask = dataclasses.replace(mask, q_positions=positions, q_segments=segments)
        q, do = (jnp.swapaxes(x, 1, 2) for x in (q, do))
        lse, delta = (jnp.swapaxes(x, 1, 2)[:, :, None] for x in (lse * flash.LOG2E, delta))
        batch, heads, length, dim = q.shape
        group = heads // k.shape[1]
        steps, count = _steps(jnp.swapaxes(_kinds(mask, blocks), 1, 2))
        by_query, by_key = _index(_key_block), _index(_query_block)  # the list is transposed
        q_block = pl.BlockSpec((None, None, blocks.q, dim), by_query(lambda h: h))
        k_block = pl.BlockSpec((None, None, blocks.k, dim), by_key(lambda h: h // group))
        dk_block = pl.BlockSpec((None, None, blocks.k, dim), by_key(lambda h: h))
        whole = pl.BlockSpec((None, None, length, dim), lambda b, h, s, *_: (b, h, 0, 0))
        stat = pl.BlockSpec(
            (None, None, 1, blocks.q), lambda b, h, s, steps, *_: (b, h, 0, _key_block(steps[b, s]))
        )
        wide = (batch, heads, k.shape[2], dim)
        return pl.pallas_call(
            functools.partial(_backward_kernel, compute=blocks.compute),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(batch, heads, count),
                in_specs=[
                    q_block,
                    q_block,
                    stat,
                    stat,
                    k_block,
                    k_block,
                    *[_row_block(blocks.q, _key_block)] * 2,
                    *[_row_block(blocks.k, _query_block)] * 2,
                ],
                out_specs=[whole, dk_block, dk_block],
                scratch_shapes=[pltpu.VMEM((blocks.k, dim), jnp.float32)] * 2,
            ),
            out_shape=[
                jax.ShapeDtypeStruct(q.shape, jnp.float32),
                *[jax.ShapeDtypeStruct(wide, jnp.float32)] * 2,
            ],
            compiler_params=_parameters(self.vmem),
            interpret=self.interpret,
            name="flash_backward",
        )(
            steps,
            _one(mask.window),
            q,
            do,
            lse,
            delta,
            k,
            v,
            *_rows(mask.q_positions, mask.q_segments),
            *_rows(mask.k_positions, _key_segments(mask)),
        )


def _parameters(vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
    )


@dataclasses.dataclass(frozen=True)
class Generation:
    """The default block sizes for one generation of TPUs.

    forward, backward: block sizes by the least number of keys that they are for. Small blocks waste
        less beyond the diagonal; large ones start less often.
    resident: the number of queries whose dq VMEM holds at once.
    vmem: the bytes of VMEM that a kernel may use.
    """

    forward: dict[int, TpuBlocks]
    backward: dict[int, TpuBlocks]
    resident: int
    vmem: int


def blocks_for(sizes: dict[int, TpuBlocks], keys: int) -> TpuBlocks:
    """Return the block sizes for `keys` keys.

    sizes: block sizes by the least number of keys that they are for.
    """
    return sizes[max(least for least in sizes if least <= keys)]


_MIB = 2**20
_MIDDLE, _LARGE = TpuBlocks(1024, 1024, 512), TpuBlocks(2048, 2048, 256)
_V5 = {0: _MIDDLE, 16384: _LARGE}, {0: TpuBlocks(512, 512, 512), 4096: _MIDDLE}
_V6 = {0: _MIDDLE, 16384: TpuBlocks(2048, 1024, 512)}, {0: _MIDDLE}
_V7 = {0: _MIDDLE, 8192: TpuBlocks(2048, 1024, 512)}, {0: _MIDDLE, 8192: TpuBlocks(1024, 2048, 256)}
# By device_kind. Chosen by `benchmarks/kernel_cost.py`, not measured: no such chip was at hand.
CHIPS = {
    "TPU v4": Generation(
        {0: TpuBlocks(512, 1024, 512)}, {0: TpuBlocks(512, 512, 512)}, 2048, 15 * _MIB
    ),
    "TPU v5 lite": Generation(*_V5, 32768, 100 * _MIB),
    "TPU v5": Generation(*_V5, 16384, 60 * _MIB),
    "TPU v6 lite": Generation(*_V6, 32768, 100 * _MIB),
    "TPU7x": Generation(*_V7, 16384, 60 * _MIB),
}
_TINY = {0: TpuBlocks(128, 256, 128)}
_SMALL = Generation(_TINY, _TINY, 256, 15 * _MIB)  # for interpreted kernels


def tpu_attention(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> Attended:
    """Attend on a TPU. Arguments and results are those of `attention.xla`.

    known: o and log-sum-exp over all keys, if k and v are a part of them (`flash.attend_through`).

    Raises NotImplementedError, with the reason, for calls that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "tpu")
    flash.decline(NAME, q, k=k, dtypes=DTYPES, head_dims=flash.HEAD_DIMS)
    if q.dtype == jnp.float16 and not interpret:  # TPUs have no float16; float32 holds it exactly
        wide = q.astype(jnp.float32), _float32(k), _float32(v)
        o = tpu_attention(*wide, mask, scale, return_lse, known)
        return o if isinstance(o, tuple) else o.astype(q.dtype)
    chip = _SMALL if interpret else CHIPS.get(choice.device().device_kind)
    if chip is None:
        raise NotImplementedError(f"{NAME}: {choice.device().device_kind} has no block sizes yet")
    what: choice.Call = {"head_dim": q.shape[-1], "dtype": q.dtype.name, "length": k.shape[1]}
    forward, backward = (blocks_for(x, k.shape[1]) for x in (chip.forward, chip.backward))
    body = TpuBody(
        dataclasses.replace(forward, **choice.blocks(NAME, "forward", **what)),
        dataclasses.replace(backward, **choice.blocks(NAME, "backward", **what)),
        chip.resident,
        chip.vmem,
        interpret,
    )
    return flash.attend_through(body, q, k, v, mask, scale, return_lse, known)


def tpu_paged_prefill(
    q: Float[Array, "B T N H"],
    kv: PoolLeaf,
    table: Int[Array, "B W"],
    written: Int[Array, " B"],
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
    *,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend from many query tokens to the tokens in the pages of their rows.

    Arguments and results are those of `decode_tpu.tpu_paged_decode`. All numbers in the pages must
    be finite.

    Raises NotImplementedError, with the reason, for calls that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "tpu") if interpret is None else interpret
    leaf = jax.tree.leaves(kv)  # values and, of an int8 leaf, scales
    flash.decline(f"{NAME}, pages", q, k=kv, dtypes=DTYPES[:2], head_dims=PAGED_HEAD_DIMS)
    # Whole registers of a page, and of a block's scores.
    flash.decline_page(NAME, kv, multiple=32 // leaf[0].dtype.itemsize, lanes=_LANES)
    chip = _SMALL if interpret else CHIPS.get(choice.device().device_kind)
    if chip is None:
        raise NotImplementedError(f"{NAME}: {choice.device().device_kind} has no block sizes yet")
    (_, length, heads, dim), (kv_heads, page) = q.shape, kv.shape[2:4]
    keys = page * table.shape[1]
    blocks = blocks_for(chip.forward, keys)
    most = max(_LANES, flash.round_up(_MOST_PAGES * page, _LANES))
    blocks = dataclasses.replace(blocks, k=min(blocks.k, most)).fitted(length, keys)
    whole = flash.round_up(blocks.k, page)
    blocks = dataclasses.replace(blocks, k=whole, compute=math.gcd(whole, blocks.compute))
    many, group = blocks.k // page, heads // kv_heads
    width = flash.round_up(table.shape[1], many)
    table = flash.pad(jnp.asarray(table, jnp.int32), width, axis=1)
    mask = flash.paged_mask(written, window, length=length, keys=width * page)
    mask = flash.padded_mask(mask, queries=flash.round_up(length, blocks.q), keys=width * page)
    steps, count = _steps(_kinds(mask, blocks))
    most = min(_PAGED_HEADS, max(1, _PAGED_PAIRS // (blocks.q * blocks.k)))
    sizes = (x for x in range(1, most + 1) if heads % x == 0 and x % group * (group % x) == 0)
    size = max(sizes)  # heads of a step: they share a key/value head, or have several whole groups
    kv_size = max(1, size // group)

    # Scales have heads along the rows of registers, so a block has eight heads, or all of them.
    scale_size = 8 if kv_heads % 8 == 0 else kv_heads

    def page_spec(array: jax.Array, i: int) -> pl.BlockSpec:
        held = kv_size if array.ndim == 5 else scale_size

        def index(b: jax.Array, h: jax.Array, s: jax.Array, *scalars: Ref) -> tuple[Any, ...]:
            steps, _, table = scalars
            entry = table[b * width + _key_block(steps[b, s]) * many + i]
            return (entry, 0, h * size // group // held, 0, 0)[: array.ndim]

        return pl.BlockSpec((None, 2, held, *array.shape[3:]), index)

    q_block = pl.BlockSpec((None, size, blocks.q, dim), _index(_query_block)(lambda h: h))
    stat = lambda b, h, s, steps, *_: (b, h, 0, _query_block(steps[b, s]))  # noqa: E731
    rows = _heads_first(flash.factored(q, scale), mask.q_positions.shape[1])
    o, lse = pl.pallas_call(
        functools.partial(_paged_kernel, group=group, compute=blocks.compute),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(q.shape[0], heads // size, count),
            in_specs=[
                q_block,
                [[page_spec(array, i) for i in range(many)] for array in leaf],
                *[_row_block(blocks.q, _query_block)] * 2,
                *[_row_block(blocks.k, _key_block)] * 2,
            ],
            out_specs=[q_block, pl.BlockSpec((None, size, 1, blocks.q), stat)],
            scratch_shapes=[
                *[pltpu.VMEM((size, blocks.q, _LANES), jnp.float32)] * 2,
                pltpu.VMEM((size, blocks.q, dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, jnp.float32),
            jax.ShapeDtypeStruct((*rows.shape[:2], 1, rows.shape[2]), jnp.float32),
        ],
        compiler_params=_parameters(chip.vmem),
        interpret=interpret,
        name="flash_paged",
    )(
        steps,
        _one(window),
        table.reshape(-1),
        rows,
        [[array] * many for array in leaf],
        *_rows(mask.q_positions, mask.q_segments),
        *_rows(mask.k_positions, _key_segments(mask)),
    )
    return jnp.swapaxes(o, 1, 2)[:, :length], jnp.swapaxes(lse[:, :, 0], 1, 2)[:, :length]


def _float32(x: KeysOrValues) -> KeysOrValues:
    return x if isinstance(x, flash.Quantised) else x.astype(jnp.float32)


class _Paged:
    """A block of one head's keys or values that lies in several pages, indexed like one array.

    pages: the pages' values [2, heads, page, H] and, if they are int8, their scales.
    side: 0 for keys, 1 for values.
    head: the head's index among those of the values.
    row: its index among those of the scales.
    """

    def __init__(self, pages: list[list[Ref]], *, side: int, head: int, row: jax.Array) -> None:
        self.pages, self.side, self.head, self.row = pages, side, head, row
        self.size = pages[0][0].shape[2]
        self.shape = (len(pages[0]) * self.size, pages[0][0].shape[3])

    def __getitem__(self, index: tuple[slice, slice]) -> jax.Array:
        """Load the values of some tokens, [tokens, H]."""
        parts = [self.pages[0][i][self.side, self.head, x] for i, x in self._parts(index[0])]
        return jnp.concatenate(parts, 0)

    def scale(self, keys: slice) -> jax.Array | None:
        """Load the scales of some tokens, [1, tokens], if there are any."""
        if len(self.pages) == 1:
            return None
        head = pl.ds(self.row, 1)
        return jnp.concatenate(
            [self.pages[1][i][self.side, head, x] for i, x in self._parts(keys)], 1
        )

    def _parts(self, keys: slice) -> list[tuple[int, slice]]:
        """Return the pages that hold some tokens, and which slots of each."""
        found, at = [], keys.start
        while at < keys.stop:
            end = min(keys.stop, at + self.size - at % self.size)
            found.append((at // self.size, slice(at % self.size, at % self.size + end - at)))
            at = end
        return found


def _paged_kernel(
    steps: Ref,
    window: Ref,
    table: Ref,
    q: Ref,
    leaf: list[list[Ref]],
    q_positions: Ref,
    q_segments: Ref,
    k_positions: Ref,
    k_segments: Ref,
    *outs_and_scratch: Ref,
    group: int,
    compute: int,
) -> None:
    """Add one block of keys and values in pages to the running softmax of several heads.

    table: int32 [B * pages], for index maps.
    leaf: the pages' values [2, heads, page, H] and, if they are int8, their scales, of more heads.
    group: query heads of a key/value head.

    Others are those of `_forward_kernel`, with an axis of heads before all that belong to one.
    """
    del table
    heads, kv_heads = q.shape[0], leaf[0][0].shape[1]
    first = pl.program_id(1) * heads // group % leaf[-1][0].shape[1]  # in the block of scales
    for head in range(heads):
        own = head * kv_heads // heads
        k, v = (_Paged(leaf, side=side, head=own, row=first + own) for side in (0, 1))
        outs = (x.at[head] for x in outs_and_scratch)
        places = (q_positions, q_segments, k_positions, k_segments)
        _forward_kernel(steps, window, q.at[head], k, v, *places, *outs, compute=compute)


def _scaled(x: jax.Array, keys: Ref | _Paged, at: slice) -> jax.Array:
    """Multiply x [queries, tokens] by the scales of quantised keys or values; others have none."""
    scale = keys.scale(at) if isinstance(keys, _Paged) else None
    return x if scale is None else x * scale


def _forward_kernel(
    steps: Ref,
    window: Ref,
    q: Ref,
    k: Ref | _Paged,
    v: Ref | _Paged,
    q_positions: Ref,
    q_segments: Ref,
    k_positions: Ref,
    k_segments: Ref,
    o: Ref,
    lse: Ref,
    largest: Ref,
    total: Ref,
    sums: Ref,
    *,
    compute: int,
) -> None:
    """Add one block of keys and values to the running softmax of one block of queries.

    steps: the packed grid steps of `_steps`.
    q: [queries, H], as from `flash.factored`.
    k, v: [keys, H].
    q_positions, q_segments, k_positions, k_segments: int32 [1, queries] or [1, keys].
    o, lse: [queries, H] and [1, queries], written in the query block's last step.
    largest: [queries, 128], the running maximum of each row in every lane.
    total: [queries, 128], the sum of exponentials of each row, spread over the lanes.
    sums: [queries, H], the output before division by the total.
    compute: keys whose scores are computed at once.
    """
    rows, dim = q.shape
    factor = flash.score_factor(dim)
    step = steps[pl.program_id(0), pl.program_id(2)]
    kind = step & 3

    @pl.when(step & _FIRST != 0)
    def _() -> None:
        largest[...] = jnp.full(largest.shape, flash.LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def block(kind: int) -> None:
        # Computed here, where they overlap with products, and not at the start of a row.
        places = None if kind == _FULL else _lanes(_column(q_positions[...]), compute)
        groups = _lanes(_column(q_segments[...]), compute) if kind == _MIXED else None
        for at in range(0, k.shape[0], compute):
            keys = slice(at, at + compute)
            scores = _scaled(_dot(q[...], k[keys, :].astype(q.dtype), _NT), k, keys)
            if places is not None:
                seen = _within(places, k_positions[:, keys], window[0])
                if groups is not None:
                    seen &= groups == k_segments[:, keys]
                scores = jnp.where(seen, scores, flash.MASKED)
            before = largest[...]
            now = jnp.maximum(before, jnp.max(scores, -1)[:, None])
            weights = jnp.exp2((scores - _lanes(now, compute)) * factor)
            fading = jnp.exp2((before - now) * factor)
            parts = [weights[:, i : i + _LANES] for i in range(0, compute, _LANES)]
            total[...] = total[...] * fading + functools.reduce(jnp.add, parts)
            largest[...] = now
            weights = _scaled(weights, v, keys).astype(q.dtype)
            added = _dot(weights, v[keys, :].astype(q.dtype), _NN)
            sums[...] = sums[...] * _lanes(fading, dim) + added

    for each in (_FULL, _NEAR, _MIXED):
        pl.when(kind == each)(functools.partial(block, each))

    @pl.when(step & _LAST != 0)
    def _() -> None:
        whole = jnp.broadcast_to(jnp.sum(total[...], -1)[:, None], (rows, _LANES))
        # The sum of a row that saw a key includes exp2(0), so the 1 only replaces sums of nothing.
        o[...] = (sums[...] / _lanes(jnp.maximum(whole, 1), dim)).astype(o.dtype)
        whole, peak = _row(whole), _row(largest[...])
        value = (peak * factor + jnp.log2(jnp.maximum(whole, 1))) / flash.LOG2E
        lse[...] = jnp.where(whole > 0, value, -jnp.inf)


def _backward_kernel(
    steps: Ref,
    window: Ref,
    q: Ref,
    do: Ref,
    lse: Ref,
    delta: Ref,
    k: Ref,
    v: Ref,
    q_positions: Ref,
    q_segments: Ref,
    k_positions: Ref,
    k_segments: Ref,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    dk_sum: Ref,
    dv_sum: Ref,
    *,
    compute: int,
) -> None:
    """Add the gradients from one block of queries and one block of keys to dq, dk and dv.

    Scores are [keys, queries] here, so that the statistics of queries are rows, as they are stored,
    and four of the five products need no transposition.

    steps: the packed grid steps of `_steps`, with queries and keys exchanged.
    q: [queries, H], as from `flash.factored`.
    lse, delta: [1, queries]; lse is in base 2.
    dq: [T, H], of all queries of the call.
    dk, dv: [keys, H], written in the key block's last step.
    dk_sum, dv_sum: [keys, H], the sums so far.
    compute: keys whose scores are computed at once.
    """
    factor = flash.score_factor(q.shape[1])
    step = steps[pl.program_id(0), pl.program_id(2)]
    kind = step & 3
    size = q.shape[0]
    rows = pl.ds(pl.multiple_of(_key_block(step) * size, size), size)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dq[...] = jnp.zeros_like(dq)

    @pl.when(step & _FIRST != 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def block(kind: int) -> None:
        for at in range(0, k.shape[0], compute):
            keys = slice(at, at + compute)
            scores = _dot(k[keys, :], q[...], _NT)
            if kind != _FULL:
                places = _lanes(_column(k_positions[:, keys]), size)
                seen = _within(q_positions[...], places, window[0])
                if kind == _MIXED:
                    seen &= q_segments[...] == _lanes(_column(k_segments[:, keys]), size)
                scores = jnp.where(seen, scores, flash.MASKED)
            weights = jnp.exp2(scores * factor - lse[...])
            dv_sum[keys, :] += _dot(weights.astype(do.dtype), do[...], _NN)
            slopes = weights * (_dot(v[keys, :], do[...], _NT) - delta[...])
            slopes = slopes.astype(q.dtype)
            dk_sum[keys, :] += _dot(slopes, q[...], _NN)
            dq[rows, :] += _dot(slopes, k[keys, :], _TN)

    for each in (_FULL, _NEAR, _MIXED):
        pl.when(kind == each)(functools.partial(block, each))

    @pl.when(step & _LAST != 0)
    def _() -> None:
        dk[...] = dk_sum[...] * (factor / flash.LOG2E)
        dv[...] = dv_sum[...]


def _kinds(mask: Mask, blocks: TpuBlocks) -> jax.Array:
    """Return the kind of work for each pair of blocks, int32 [B, query blocks, key blocks].

    It is `_EMPTY` where no query sees a key, `_FULL` where every query sees every key, `_NEAR`
    where both blocks are of the same single segment, and `_MIXED` otherwise.
    """
    q = flash.extent(mask.q_positions, mask.q_segments, block=blocks.q)
    k = flash.extent(mask.k_positions, mask.k_segments, block=blocks.k)
    q = flash.Extent(*(x[:, :, None] for x in q))
    k = flash.Extent(*(x[:, None, :] for x in k))
    one_segment = (q.uniform == 1) & (k.uniform == 1) & (q.low == k.low)
    partly = jnp.where(one_segment, _NEAR, _MIXED)
    kinds = jnp.where(flash.visible(q, k, window=mask.window), partly, _EMPTY)
    return jnp.where(flash.full(q, k, window=mask.window), _FULL, kinds)


def _steps(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """List the block pairs to visit, output block by output block, as packed grid steps.

    kinds: int32 [B, R, C], from `_kinds`, with the output's blocks along R.

    Returns int32 [B, R * C], and the number of steps in the longest list. An output block without
    visible pairs gets one empty step, which writes it; shorter lists end in steps that do nothing.
    Raises NotImplementedError for too many blocks.
    """
    batch, rows, columns = kinds.shape
    if max(rows, columns) >= 2**_INDEX_BITS:
        raise NotImplementedError(f"flash_tpu: {rows} x {columns} blocks are too many for a list")
    row = jax.lax.broadcasted_iota(jnp.int32, kinds.shape, 1)
    column = jax.lax.broadcasted_iota(jnp.int32, kinds.shape, 2)
    visited = kinds != _EMPTY
    visited |= (column == 0) & ~jnp.any(visited, 2, keepdims=True)
    ordinal = jnp.cumsum(visited, 2)
    steps = (row << (_INDEX_BITS + 4)) | (column << 4) | kinds
    steps |= jnp.where(ordinal == 1, _FIRST, 0)
    steps |= jnp.where(ordinal == ordinal[:, :, -1:], _LAST, 0)
    beyond = jnp.iinfo(jnp.int32).max
    steps = jnp.sort(jnp.where(visited, steps, beyond).reshape(batch, rows * columns), 1)
    counts = jnp.sum(steps != beyond, 1)
    final = jnp.take_along_axis(steps, counts[:, None] - 1, 1)
    return jnp.where(steps == beyond, final & ~15, steps), jnp.max(counts)


def _query_block(step: jax.Array) -> jax.Array:
    """Return the index of the output's block in a packed grid step.

    It is a block of queries in the forward pass, and of keys in the backward pass.
    """
    return step >> (_INDEX_BITS + 4)


def _key_block(step: jax.Array) -> jax.Array:
    """Return the index of the block that is visited in a packed grid step.

    It is a block of keys in the forward pass, and of queries in the backward pass.
    """
    return (step >> 4) & (2**_INDEX_BITS - 1)


def _index(block: _Index) -> Callable[[_Index], Callable[..., tuple[Any, ...]]]:
    """Return a function that makes index maps of block specs for arrays [B, heads, tokens, H].

    block: returns the array's block of tokens, given a packed grid step.

    The returned function takes one that returns the array's head, given the query head.
    """
    return lambda head: lambda b, h, s, steps, *_: (b, head(h), block(steps[b, s]), 0)


def _row_block(size: int, block: _Index) -> pl.BlockSpec:
    """Return the block spec of positions or segments [B, 1, tokens], in blocks of `size` tokens.

    block: returns the index of the block, given a packed grid step.
    """
    return pl.BlockSpec((None, 1, size), lambda b, h, s, steps, *_: (b, 0, block(steps[b, s])))


def _stat_block(size: int) -> pl.BlockSpec:
    """Return the block spec of statistics of queries [B, N, 1, T], in blocks of `size` tokens."""
    index = lambda b, h, s, steps, *_: (b, h, 0, _query_block(steps[b, s]))  # noqa: E731
    return pl.BlockSpec((None, None, 1, size), index)


def _rows(*arrays: jax.Array) -> list[jax.Array]:
    """Reshape arrays [B, T] to [B, 1, T], so that the tokens of a block lie along the lanes."""
    return [x[:, None] for x in arrays]


def _one(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.int32).reshape(1)


def _key_segments(mask: Mask) -> jax.Array:
    """Return the segments of keys, with padding changed so that it equals no query's segment."""
    return jnp.where(mask.k_segments == 0, -1, mask.k_segments)


def _heads_first(x: jax.Array, length: int) -> jax.Array:
    """Reorder x [B, S, K, H] to [B, K, S, H], with S padded to `length`."""
    return flash.pad(jnp.swapaxes(x, 1, 2), length, axis=2)


def _even(length: int, most: int) -> int:
    """Return the size of a block when `length` is cut into the fewest blocks of at most `most`."""
    return flash.round_up(-(-length // -(-length // most)), _LANES)


def _diagonal(x: jax.Array) -> jax.Array:
    """Set all but the diagonal of x [128, 128] to 0."""
    across, down = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(across == down, x, 0)


def _column(row: jax.Array) -> jax.Array:
    """Turn a row vector [1, n] into columns [n, 128], with the value of a token in every lane.

    It uses float32 sums of one term, exact for integers below 2**24: a transposition, or a sum of
    integers, costs several times as much.
    """
    parts = []
    for at in range(0, row.shape[1], _LANES):
        part = row[:, at : at + _LANES].astype(jnp.float32)
        part = jnp.sum(_diagonal(jnp.broadcast_to(part, (_LANES, _LANES))), 1, keepdims=True)
        parts.append(jnp.broadcast_to(part.astype(row.dtype), (_LANES, _LANES)))
    return jnp.concatenate(parts, 0)


def _row(column: jax.Array) -> jax.Array:
    """Turn columns [n, 128], with equal values in all lanes, into a row vector [1, n]."""
    squares = [column[at : at + _LANES] for at in range(0, column.shape[0], _LANES)]
    return jnp.concatenate([jnp.sum(_diagonal(x), 0, keepdims=True) for x in squares], 1)


def _within(q: jax.Array, k: jax.Array, window: jax.Array) -> jax.Array:
    """Return whether 0 <= q - k < window, for positions q and k, by one comparison.

    A shift of both sides by 2**31 makes the comparison unsigned.
    """
    return (q + _SIGN) - k < window + _SIGN


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """Repeat or cut x [n, 128], with equal values in all lanes, to [n, width]."""
    if width <= _LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // _LANES)))[:, :width]


def _dot(x: jax.Array, y: jax.Array, dimensions: jax.lax.DotDimensionNumbers) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
