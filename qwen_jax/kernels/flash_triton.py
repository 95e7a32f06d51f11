"""Flash attention for NVIDIA GPUs from A100 on, forward and backward, in Pallas Triton.

A Triton program keeps a tile of queries (or keys) and walks over the blocks of keys (or queries)
that the mask leaves visible: a run of wholly visible blocks without mask arithmetic, and the blocks
before and behind it, each after a check. The bounds of the walk are computed before the kernel
starts, from the ranges of positions and segments in blocks. The backward pass is two kernels, one
over tiles of keys and one over tiles of queries, so that every sum has one owner: no atomics, and
the same bits each time.

`triton_paged_prefill` runs the forward kernel on keys and values in pages.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.kernels import choice, flash
from qwen_jax.kernels.flash import Attended, KeysOrValues, PoolLeaf, Ref, Scale
from qwen_jax.kernels.mask import Mask

NAME = "pallas_triton"
DTYPES = ("bfloat16", "float16", "float32")
# Triton's arrays have power-of-two lengths. Other head dims are cut into such parts instead of
# being padded: a product over the head dim is a sum of products over parts, and no lane is wasted.
_PARTS = {80: (64, 16), 96: (64, 32)}
_LEAST_BLOCK = 16  # keys that a tensor core multiplies at least
_ALL = slice(None)
_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))  # contracts the last axis of both operands


@dataclasses.dataclass(frozen=True)
class TritonBlocks:
    """The block sizes of a kernel.

    tile: tokens of the tile that a program keeps, a power of two.
    block: tokens of the blocks that it walks over, a power of two.
    warps: warps of a program.
    stages: blocks being loaded from memory at once.
    """

    tile: int
    block: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class TritonBody:
    """The `flash.Body` for Triton.

    forward_blocks: block sizes of the forward kernel, whose tiles are of queries.
    dkv_blocks: block sizes of the backward kernel for dk and dv, whose tiles are of keys.
    dq_blocks: block sizes of the backward kernel for dq, whose tiles are of queries.
    interpret: whether kernels run interpreted.
    """

    forward_blocks: TritonBlocks
    dkv_blocks: TritonBlocks
    dq_blocks: TritonBlocks
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
        """Compute o and the log-sum-exp by a Triton kernel, as `flash.Body.forward` says."""
        (batch, length, heads, dim), keys, sizes = q.shape, k.shape[1], self.forward_blocks
        queries = flash.round_up(length, sizes.tile)
        q, scale = flash.pad(q, queries, axis=1), flash.pad(scale * math.sqrt(dim), queries, axis=1)
        k, v = (flash.pad(x, flash.round_up(keys, sizes.block), axis=1) for x in (k, v))
        mask = flash.padded_mask(mask, queries=queries, keys=k.shape[1])
        plan, specs = _plan(mask, sizes), _QuerySpecs(q, k, sizes.tile)
        o, lse = self._call(
            functools.partial(_forward, block=sizes.block),
            "flash_forward",
            sizes,
            specs.grid,
            [
                *_plan_specs(specs.program, plan),
                specs.scale,
                specs.q,
                specs.k,
                specs.k,
                *specs.places,
            ],
            [specs.q, specs.stat],
            [
                jax.ShapeDtypeStruct(q.shape, dtype),
                jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
            ],
        )(*plan, scale, q, k, v, *flash.places(mask))
        return o[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]

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
        q = flash.factored(q, scale)  # as both kernels take it
        lse, delta = (jnp.swapaxes(x, 1, 2) for x in (lse * flash.LOG2E, delta))  # [B, N, T]
        dq = self._dq(q, k, v, mask, scale, lse, delta, do)
        dk, dv = self._dkv(q, k, v, mask, lse, delta, do)
        return dq, dk, dv

    def _dq(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        do: jax.Array,
    ) -> jax.Array:
        """Compute dq [B, T, N, H] by the backward kernel over tiles of queries.

        q: [B, T, N, H], as from `flash.factored`.
        lse, delta: float32 [B, N, T]; lse is the log-sum-exp in base 2.
        do: [B, T, N, H], the gradient of o.
        """
        length, sizes = q.shape[1], self.dq_blocks
        queries, keys = (
            flash.round_up(x.shape[1], size) for x, size in ((q, sizes.tile), (k, sizes.block))
        )
        q, do, scale = (flash.pad(x, queries, axis=1) for x in (q, do, scale))
        lse, delta = (flash.pad(x, queries, axis=2) for x in (lse, delta))
        k, v = (flash.pad(x, keys, axis=1) for x in (k, v))
        mask = flash.padded_mask(mask, queries=queries, keys=keys)
        plan, specs = _plan(mask, sizes), _QuerySpecs(q, k, sizes.tile)
        (dq,) = self._call(
            functools.partial(_backward_queries, block=sizes.block),
            "flash_backward_queries",
            sizes,
            specs.grid,
            [
                *_plan_specs(specs.program, plan),
                *[specs.scale, specs.q, specs.k, specs.k, *specs.places],
                *[specs.q, specs.stat, specs.stat],
            ],
            [specs.q],
            [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        )(*plan, scale, q, k, v, *flash.places(mask), do, lse, delta)
        return dq[:, :length]

    def _dkv(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        lse: jax.Array,
        delta: jax.Array,
        do: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute dk and dv [B, S, K, H] by the backward kernel over tiles of keys.

        q: [B, T, N, H], as from `flash.factored`.
        lse, delta: float32 [B, N, T]; lse is the log-sum-exp in base 2.
        do: [B, T, N, H], the gradient of o.
        """
        length, sizes = k.shape[1], self.dkv_blocks
        queries, keys = (
            flash.round_up(x.shape[1], size) for x, size in ((q, sizes.block), (k, sizes.tile))
        )
        q, do = (flash.pad(x, queries, axis=1) for x in (q, do))
        lse, delta = (flash.pad(x, queries, axis=2) for x in (lse, delta))
        k, v = (flash.pad(x, keys, axis=1) for x in (k, v))
        mask = flash.padded_mask(mask, queries=queries, keys=keys)
        plan, specs = _plan(mask, sizes, of_keys=True), _KeySpecs(q, k, sizes.tile)
        dk, dv = self._call(
            functools.partial(_backward_keys, block=sizes.block),
            "flash_backward_keys",
            sizes,
            specs.grid,
            [
                *_plan_specs(specs.program, plan),
                *[specs.q, specs.k, specs.k, *specs.places],
                *[specs.q, specs.stat, specs.stat],
            ],
            [specs.k, specs.k],
            [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        )(*plan, q, k, v, *flash.places(mask), do, lse, delta)
        return dk[:, :length], dv[:, :length]

    def _call(
        self,
        kernel: Callable[..., None],
        name: str,
        sizes: TritonBlocks,
        grid: tuple[int, int, int],
        in_specs: list[pl.BlockSpec | list[pl.BlockSpec]],
        out_specs: list[pl.BlockSpec],
        out_shape: list[jax.ShapeDtypeStruct],
    ) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            compiler_params=pltriton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
            interpret=self.interpret,
            name=name,
        )


_HOPPERS = ("H100", "H20", "H800")  # H200 and GH200 too
# Blocks of forward, dkv and dq for head dims up to each key. Chosen by ptxas reports (the largest
# that spill no register and fit in shared memory), not measured: no such GPU was at hand. _AMPERE's
# fit in 99 KiB, all that lesser GPUs of compute capability 8 have.
_HOPPER = {
    64: (TritonBlocks(128, 128, 8, 3), TritonBlocks(128, 64, 8, 2), TritonBlocks(128, 128, 8, 2)),
    128: (TritonBlocks(128, 128, 8, 2), TritonBlocks(128, 64, 8, 2), TritonBlocks(128, 64, 8, 2)),
    256: (TritonBlocks(64, 64, 8, 2), TritonBlocks(32, 32, 8, 2), TritonBlocks(64, 32, 8, 2)),
}
_AMPERE = {
    64: (TritonBlocks(128, 64, 8, 3), TritonBlocks(128, 32, 8, 2), TritonBlocks(128, 64, 8, 2)),
    96: (TritonBlocks(128, 64, 8, 3), TritonBlocks(128, 32, 8, 2), TritonBlocks(64, 64, 4, 2)),
    128: (TritonBlocks(128, 64, 8, 3), TritonBlocks(64, 64, 8, 2), TritonBlocks(64, 64, 4, 2)),
    256: (TritonBlocks(64, 32, 8, 2), TritonBlocks(32, 32, 8, 2), TritonBlocks(32, 32, 4, 2)),
}
# Tensor cores do not multiply in full float32: these products are computed in registers.
_FLOAT32 = {
    128: (TritonBlocks(32, 32, 8, 1), TritonBlocks(32, 32, 8, 1), TritonBlocks(32, 32, 4, 2)),
    256: (TritonBlocks(16, 32, 8, 1), TritonBlocks(16, 16, 8, 1), TritonBlocks(16, 16, 4, 2)),
}


def triton_attention(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
    known: tuple[jax.Array, jax.Array] | None = None,
    *,
    forward_blocks: TritonBlocks | None = None,
    dkv_blocks: TritonBlocks | None = None,
    dq_blocks: TritonBlocks | None = None,
    interpret: bool | None = None,
) -> Attended:
    """Attend on an NVIDIA GPU. Other arguments and the results are those of `attention.xla`.

    known: o and log-sum-exp over all keys, if k and v are a part of them (`flash.attend_through`).
    forward_blocks, dkv_blocks, dq_blocks: block sizes of the three kernels; None takes measured
        ones, or this device's defaults.
    interpret: whether to interpret the kernels; None does so on a CPU only.

    Raises NotImplementedError, with the reason, for calls that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "gpu") if interpret is None else interpret
    choice.need_gpu(NAME, 7.5)
    flash.decline(NAME, q, k=k, dtypes=DTYPES, head_dims=flash.HEAD_DIMS)
    forward, dkv, dq = _default_blocks(q.shape[-1], q.dtype)
    what: choice.Call = {"head_dim": q.shape[-1], "dtype": q.dtype.name, "length": k.shape[1]}
    forward = dataclasses.replace(forward, **choice.blocks(NAME, "forward", **what))
    backward = choice.blocks(NAME, "backward", **what)
    dkv, dq = _replaced(dkv, "dkv_", backward), _replaced(dq, "dq_", backward)
    body = TritonBody(forward_blocks or forward, dkv_blocks or dkv, dq_blocks or dq, interpret)
    return flash.attend_through(body, q, k, v, mask, scale, return_lse, known)


def triton_paged_prefill(
    q: Float[Array, "B T N H"],
    kv: PoolLeaf,
    table: Int[Array, "B W"],
    written: Int[Array, " B"],
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
    *,
    blocks: TritonBlocks | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend from many query tokens to the tokens in the pages of their rows.

    Arguments and results are those of `decode_triton.triton_paged_decode`. All numbers in the pages
    must be finite.

    blocks: block sizes of the forward kernel; None takes this device's defaults. Blocks of keys are
        cut to parts of a page.

    Raises NotImplementedError, with the reason, for calls that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "gpu") if interpret is None else interpret
    choice.need_gpu(NAME, 7.5)
    flash.decline(NAME, q, k=kv, dtypes=DTYPES, head_dims=flash.HEAD_DIMS)
    flash.decline_page(NAME, kv, multiple=_LEAST_BLOCK)
    sizes = blocks or _default_blocks(q.shape[-1], q.dtype)[0]
    page = kv.shape[3]
    sizes = dataclasses.replace(sizes, block=min(sizes.block, page & -page))
    (batch, length, heads, dim), keys = q.shape, page * table.shape[1]
    queries = flash.round_up(length, sizes.tile)
    q, scale = flash.pad(q, queries, axis=1), flash.pad(scale * math.sqrt(dim), queries, axis=1)
    mask = flash.paged_mask(written, window, length=queries, keys=keys)
    plan = _plan(mask, sizes)
    gathered = jax.ShapeDtypeStruct((batch, keys, kv.shape[2], dim), q.dtype)
    specs = _QuerySpecs(q, gathered, sizes.tile)
    leaf = jax.tree.leaves(kv)  # values and, of an int8 leaf, scales
    body = TritonBody(sizes, sizes, sizes, interpret)
    o, lse = body._call(
        functools.partial(_paged_forward, block=sizes.block),
        "flash_paged",
        sizes,
        specs.grid,
        [
            pl.BlockSpec((None, table.shape[1]), lambda t, n, b: (b, 0)),
            *_plan_specs(specs.program, plan),
            specs.scale,
            specs.q,
            [pl.BlockSpec()] * len(leaf),
            *specs.places,
        ],
        [specs.q, specs.stat],
        [
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
    )(jnp.asarray(table, jnp.int32), *plan, scale, q, leaf, *flash.places(mask))
    return o[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]


def _replaced(blocks: TritonBlocks, part: str, sizes: dict[str, int]) -> TritonBlocks:
    """Replace block sizes by measured ones.

    part: the prefix of the names of this kernel's sizes, "dkv_" or "dq_".
    sizes: the measured sizes of both kernels, such as `{"dq_tile": 64}`; others stay.
    """
    own = {key.removeprefix(part): size for key, size in sizes.items() if key.startswith(part)}
    return dataclasses.replace(blocks, **own)


def _default_blocks(dim: int, dtype: DTypeLike) -> tuple[TritonBlocks, TritonBlocks, TritonBlocks]:
    """Return this device's default block sizes of the forward, the dkv and the dq kernel."""
    kind = choice.device().device_kind
    if jnp.dtype(dtype).itemsize == 4:
        table = _FLOAT32
    else:
        table = _HOPPER if any(name in kind for name in _HOPPERS) else _AMPERE
    return table[min(size for size in table if size >= dim)]


class _QuerySpecs:
    """The grid and block specs of a kernel over tiles of queries."""

    def __init__(self, q: jax.Array, k: jax.Array | jax.ShapeDtypeStruct, tile: int) -> None:
        batch, queries, heads, dim = q.shape
        tiles, group = queries // tile, heads // k.shape[2]

        def at(t: jax.Array) -> jax.Array:
            return tiles - 1 - t  # the longest of a causal mask start first

        self.grid = (tiles, heads, batch)
        self.program = pl.BlockSpec((None, None, 8), lambda t, n, b: (b, at(t), 0))
        self.q = pl.BlockSpec((None, tile, None, dim), lambda t, n, b: (b, at(t), n, 0))
        self.k = pl.BlockSpec((None, k.shape[1], None, dim), lambda t, n, b: (b, 0, n // group, 0))
        self.stat = pl.BlockSpec((None, None, tile), lambda t, n, b: (b, n, at(t)))
        self.scale = pl.BlockSpec((None, tile), lambda t, n, b: (b, at(t)))
        self.places = [
            pl.BlockSpec((None, 2, tile), lambda t, n, b: (b, 0, at(t))),
            pl.BlockSpec((None, 2, k.shape[1]), lambda t, n, b: (b, 0, 0)),
        ]


class _KeySpecs:
    """The grid and block specs of a kernel over tiles of keys.

    The blocks of `q` and `stat` hold all query heads that share a key head.
    """

    def __init__(self, q: jax.Array, k: jax.Array, tile: int) -> None:
        batch, keys, heads, dim = k.shape
        queries, group = q.shape[1], q.shape[2] // heads
        self.grid = (keys // tile, heads, batch)
        self.program = pl.BlockSpec((None, None, 8), lambda t, n, b: (b, t, 0))
        self.q = pl.BlockSpec((None, queries, group, dim), lambda t, n, b: (b, 0, n, 0))
        self.k = pl.BlockSpec((None, tile, None, dim), lambda t, n, b: (b, t, n, 0))
        self.stat = pl.BlockSpec((None, group, queries), lambda t, n, b: (b, n, 0))
        self.places = [
            pl.BlockSpec((None, 2, queries), lambda t, n, b: (b, 0, 0)),
            pl.BlockSpec((None, 2, tile), lambda t, n, b: (b, 0, t)),
        ]


def _plan_specs(program: pl.BlockSpec, plan: tuple[jax.Array, ...]) -> list[pl.BlockSpec]:
    """Return the block specs of the three arrays that `_plan` returns.

    program: the block spec of the first array.
    """
    return [
        program,
        pl.BlockSpec((None, *plan[1].shape[1:]), lambda t, n, b: (b, 0, 0)),
        pl.BlockSpec((1,), lambda t, n, b: (0,)),
    ]


def _plan(mask: Mask, sizes: TritonBlocks, of_keys: bool = False) -> tuple[jax.Array, ...]:
    """Compute the bounds of each program's walk from the mask.

    of_keys: whether programs keep tiles of keys and walk over blocks of queries.

    Returns three arrays. For each tile, int32 [B, tiles, 8]: the first visible block, the first and
    one past the last of a run of full blocks, one past the last visible block, and the first four
    fields of the tile's extent. For each block the same fields of its extent, int32 [B, blocks, 4].
    The window, int32 [1].
    """
    q = flash.extent(
        mask.q_positions, mask.q_segments, block=sizes.block if of_keys else sizes.tile
    )
    k = flash.extent(
        mask.k_positions, mask.k_segments, block=sizes.tile if of_keys else sizes.block
    )
    window = jnp.maximum(jnp.asarray(mask.window, jnp.int32), 0)
    tiles, blocks = (k, q) if of_keys else (q, k)
    along = flash.Extent(*(x[:, :, None] for x in tiles))
    across = flash.Extent(*(x[:, None, :] for x in blocks))
    pair = (across, along) if of_keys else (along, across)
    # XLA makes these pairs inside the reductions and holds none of them.
    seen, full = flash.visible(*pair, window=window), flash.full(*pair, window=window)
    index = lax.broadcasted_iota(jnp.int32, seen.shape, 2)

    def least(chosen: jax.Array, otherwise: jax.Array | int) -> jax.Array:
        return jnp.min(jnp.where(chosen, index, otherwise), 2, keepdims=True)

    def beyond(chosen: jax.Array, otherwise: jax.Array | int) -> jax.Array:
        return jnp.max(jnp.where(chosen, index + 1, otherwise), 2, keepdims=True)

    first, last = least(seen, seen.shape[2]), beyond(seen, 0)
    # The full blocks of most masks are one run. A ring that has wrapped has two: find the first and
    # the last, and take the longer one.
    head = least(full, last)
    head_end = least(~full & (index >= head), last)
    tail_end = beyond(full, first)
    tail = beyond(~full & (index < tail_end), first)
    longer = head_end - head >= tail_end - tail
    bounds = first, jnp.where(longer, head, tail), jnp.where(longer, head_end, tail_end), last
    program = jnp.concatenate([*bounds, jnp.stack(tiles[:4], 2)], 2)
    return program, jnp.stack(blocks[:4], 2), window.reshape(1)


def _walk(
    program: Ref,
    blocks: Ref,
    window: Ref,
    visit: Callable[[jax.Array, bool, Any], Any],
    state: Any,
    of_keys: bool = False,
) -> Any:
    """Apply state = visit(block, masked, state) to the blocks that a tile may see.

    program, blocks, window: the tile's part of the arrays from `_plan`.
    visit: takes the index of a block, and whether some pair of the block must be masked. A run of
        full blocks, where none must be, comes first.
    state: the state before the first block.
    of_keys: whether the tile is of keys, and the blocks are of queries.

    Returns the state after the last block.
    """
    first, full, full_end, last = (program[i] for i in range(4))
    before = full - first

    def careful(index: jax.Array, state: Any) -> Any:
        block = jnp.where(index < before, first + index, full_end + index - before)
        mine = flash.Extent(*(program[4 + i] for i in range(4)), uniform=None)
        other = flash.Extent(*(blocks[block, i] for i in range(4)), uniform=None)
        pair = (other, mine) if of_keys else (mine, other)
        # A loop of zero or one step, not a branch, lets Triton load ahead with fewer registers.
        end = block + flash.visible(*pair, window=window[0]).astype(jnp.int32)
        return lax.fori_loop(block, end, lambda i, x: visit(i, True, x), state)

    state = lax.fori_loop(full, full_end, lambda i, x: visit(i, False, x), state)
    return lax.fori_loop(0, before + last - full_end, careful, state)


class _Keys:
    """The keys or the values of one head, as an array [S, H], read in blocks."""

    def __init__(self, ref: Ref, block: int) -> None:
        self.ref, self.size = ref, block

    def block(self, index: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        """Load a block, [block, H], as a list of its parts along the head dim."""
        return _load(self.ref, pl.ds(index * self.size, self.size))

    def scaled(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Multiply x [queries, block] by the scales of the block, of which an array has none."""
        return x


class _PagedKeys:
    """The keys or the values of one head in pages, read in blocks that are parts of a page.

    leaf: the pages' values [P, 2, K, page, H] and, if they are int8, their scales.
    table: int32 [W], the pages.
    side: 0 for keys, 1 for values.
    head: the index of the key/value head.
    """

    def __init__(
        self, leaf: list[Ref], table: Ref, *, side: int, head: jax.Array, block: int
    ) -> None:
        self.leaf, self.table, self.side, self.head, self.size = leaf, table, side, head, block

    def block(self, index: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        """Load a block, [block, H], as a list of its parts along the head dim in `dtype`."""
        ref, at = self.leaf[0], self._at(index)
        return [ref[*at, part].astype(dtype) for part in _parts(ref.shape[-1])]

    def scaled(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Multiply x [queries, block] by the scales of the block, if there are any."""
        return x * self.leaf[1][self._at(index)][None, :] if self.leaf[1:] else x

    def _at(self, index: jax.Array) -> tuple[Any, ...]:
        """Return the indices of a block in the pool, without the head dim."""
        first, page = index * self.size, self.leaf[0].shape[3]
        slots = pl.ds(lax.rem(first, page), self.size)
        return self.table[first // page], self.side, self.head, slots


def _paged_forward(
    table: Ref,
    program: Ref,
    blocks: Ref,
    window: Ref,
    scale: Ref,
    q: Ref,
    leaf: list[Ref],
    *places_and_outs: Ref,
    block: int,
) -> None:
    """Compute `_forward` on keys and values in pages.

    table: int32 [W], the pages of this row.
    leaf: the pages' values [P, 2, K, page, H] and, if they are int8, their scales.
    """
    head = pl.program_id(1) * leaf[0].shape[2] // pl.num_programs(1)
    k, v = (_PagedKeys(leaf, table, side=side, head=head, block=block) for side in (0, 1))
    _softmax(program, blocks, window, scale, q, k, v, *places_and_outs)


def _forward(
    program: Ref,
    blocks: Ref,
    window: Ref,
    scale: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    *places_and_outs: Ref,
    block: int,
) -> None:
    """Compute o and the log-sum-exp of one tile of queries of one head.

    program, blocks, window: the tile's part of the arrays from `_plan`.
    scale: [tile], without the part in `flash.score_factor`.
    q, o: [tile, H].
    lse: [tile].
    k, v: [S, H].
    q_places, k_places: positions and segments, int32 [2, tile] and [2, S].
    block: keys in a block.
    """
    k, v = _Keys(k, block), _Keys(v, block)
    _softmax(program, blocks, window, scale, q, k, v, *places_and_outs)


def _softmax(
    program: Ref,
    blocks: Ref,
    window: Ref,
    scale: Ref,
    q: Ref,
    k: _Keys | _PagedKeys,
    v: _Keys | _PagedKeys,
    q_places: Ref,
    k_places: Ref,
    o: Ref,
    lse: Ref,
) -> None:
    """Compute `_forward`."""
    tile, dim = q.shape
    factor = flash.score_factor(dim)
    rows = [_scaled(q[:, part], scale[...][:, None]) for part in _parts(dim)]

    def visit(index: jax.Array, masked: bool, state: Any) -> Any:
        largest, total, sums = state
        scores = k.scaled(_product(rows, k.block(index, q.dtype)), index)
        if masked:
            keys = pl.ds(index * k.size, k.size)
            scores = _masked(scores, _at(q_places, _ALL), _at(k_places, keys), window[0])
        now = jnp.maximum(largest, jnp.max(scores, 1))
        weights = jnp.exp2((scores - now[:, None]) * factor)
        fading = jnp.exp2((largest - now) * factor)
        total = total * fading + jnp.sum(weights, 1)
        sums = [x * fading[:, None] for x in sums]
        sums = _add(sums, v.scaled(weights, index), v.block(index, q.dtype))
        return now, total, sums

    nothing = (
        jnp.full((tile,), flash.LOWEST, jnp.float32),
        jnp.zeros((tile,), jnp.float32),
        _zeros(tile, dim),
    )
    largest, total, sums = _walk(program, blocks, window, visit, nothing)
    divisor = jnp.where(total > 0, total, 1)
    for part, x in zip(_parts(dim), sums, strict=True):
        o[:, part] = (x / divisor[:, None]).astype(o.dtype)
    lse[...] = jnp.where(total > 0, (largest * factor + jnp.log2(divisor)) / flash.LOG2E, -jnp.inf)


def _backward_queries(
    program: Ref,
    blocks: Ref,
    window: Ref,
    scale: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    q_places: Ref,
    k_places: Ref,
    do: Ref,
    lse: Ref,
    delta: Ref,
    dq: Ref,
    *,
    block: int,
) -> None:
    """Compute dq of one tile of queries of one head.

    program, blocks, window: the tile's part of the arrays from `_plan`.
    scale: [tile], the whole scale.
    q: [tile, H], as from `flash.factored`.
    k, v: [S, H].
    q_places, k_places: positions and segments, int32 [2, tile] and [2, S].
    do, dq: [tile, H].
    lse, delta: [tile]; lse is in base 2.
    block: keys in a block.
    """
    tile, dim = q.shape
    factor = flash.score_factor(dim)
    rows, slopes_in = _load(q, _ALL), _load(do, _ALL)
    row_lse, row_delta = lse[...][:, None], delta[...][:, None]

    def visit(index: jax.Array, masked: bool, sums: Any) -> Any:
        keys = pl.ds(index * block, block)
        columns = _load(k, keys)
        scores = _product(rows, columns)
        if masked:
            scores = _masked(scores, _at(q_places, _ALL), _at(k_places, keys), window[0])
        weights = jnp.exp2(scores * factor - row_lse)
        slopes = weights * (_product(slopes_in, _load(v, keys)) - row_delta)
        return _add(sums, slopes, columns)

    sums = _walk(program, blocks, window, visit, _zeros(tile, dim))
    for part, x in zip(_parts(dim), sums, strict=True):
        dq[:, part] = (x * scale[...][:, None]).astype(dq.dtype)


def _backward_keys(
    program: Ref,
    blocks: Ref,
    window: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    q_places: Ref,
    k_places: Ref,
    do: Ref,
    lse: Ref,
    delta: Ref,
    dk: Ref,
    dv: Ref,
    *,
    block: int,
) -> None:
    """Compute dk and dv of one tile of keys of one head.

    Scores are [keys, queries] here, so dk and dv are sums over columns.

    program, blocks, window: the tile's part of the arrays from `_plan`.
    q, do: [T, G, H]; q is as from `flash.factored`.
    k, v, dk, dv: [tile, H].
    q_places, k_places: positions and segments, int32 [2, T] and [2, tile].
    lse, delta: [G, T]; lse is in base 2.
    block: queries in a block.
    """
    tile, dim = k.shape
    factor = flash.score_factor(dim)
    keys, values = _load(k, _ALL), _load(v, _ALL)

    def over(member: jax.Array, state: Any) -> Any:
        def visit(index: jax.Array, masked: bool, state: Any) -> Any:
            dk_sums, dv_sums = state
            rows = pl.ds(index * block, block)
            columns = _load(q, rows, member)
            scores = _product(keys, columns)
            if masked:
                places = _at(q_places, rows), _at(k_places, _ALL)
                scores = _masked(scores, *places, window[0], turned=True)
            weights = jnp.exp2(scores * factor - lse[member, rows][None, :])
            slopes_in = _load(do, rows, member)
            dv_sums = _add(dv_sums, weights, slopes_in)
            slopes = weights * (_product(values, slopes_in) - delta[member, rows][None, :])
            return _add(dk_sums, slopes, columns), dv_sums

        return _walk(program, blocks, window, visit, state, of_keys=True)

    nothing = _zeros(tile, dim), _zeros(tile, dim)
    dk_sums, dv_sums = lax.fori_loop(0, q.shape[1], over, nothing)
    for part, x, y in zip(_parts(dim), dk_sums, dv_sums, strict=True):
        dk[:, part] = (x * (factor / flash.LOG2E)).astype(dk.dtype)
        dv[:, part] = y.astype(dv.dtype)


def _parts(dim: int) -> list[slice]:
    """Return slices that cut a head dim into parts whose lengths are powers of two."""
    sizes = _PARTS.get(dim, (dim,))
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _load(ref: Ref, rows: Any, *head: Any) -> list[jax.Array]:
    """Load rows of an array as a list of its parts along the head dim.

    head: the index of the head, if the array has an axis of heads.
    """
    return [ref[rows, *head, part] for part in _parts(ref.shape[-1])]


def _at(places: Ref, rows: Any) -> tuple[jax.Array, jax.Array]:
    """Load the positions and the segments of some tokens.

    places: int32 [2, tokens], positions and segments.
    rows: the slice of tokens.
    """
    return places[0, rows], places[1, rows]


def _zeros(rows: int, dim: int) -> list[jax.Array]:
    sizes = _PARTS.get(dim, (dim,))
    return [jnp.zeros((rows, size), jnp.float32) for size in sizes]


def _dot(a: jax.Array, b: jax.Array, dimensions: lax.DotDimensionNumbers) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Multiply matrices, each given as a list of parts along the head dim: a b^T."""
    return functools.reduce(jnp.add, (_dot(x, y, _NT) for x, y in zip(a, b, strict=True)))


def _add(sums: list[jax.Array], weights: jax.Array, b: list[jax.Array]) -> list[jax.Array]:
    """Return sums + weights b, where sums and b are lists of parts along the head dim."""
    weights = weights.astype(b[0].dtype)
    return [x + _dot(weights, y, _NN) for x, y in zip(sums, b, strict=True)]


def _scaled(q: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply q by scale and round to q's dtype.

    Forward and backward pass round alike; otherwise the weights would not sum to one.
    """
    return (q.astype(jnp.float32) * scale).astype(q.dtype)


def _masked(
    scores: jax.Array,
    q_places: tuple[jax.Array, jax.Array],
    k_places: tuple[jax.Array, jax.Array],
    window: jax.Array,
    turned: bool = False,
) -> jax.Array:
    """Set scores [queries, keys] to `flash.MASKED` where the mask hides a key.

    q_places, k_places: positions and segments of the queries, and of the keys.
    turned: whether the scores are [keys, queries] instead.
    """

    def query(x: jax.Array) -> jax.Array:
        return x[None, :] if turned else x[:, None]

    def key(x: jax.Array) -> jax.Array:
        return x[:, None] if turned else x[None, :]

    distance = query(q_places[0]) - key(k_places[0])
    same = query(q_places[1]) == key(k_places[1])
    # 0 <= distance < window by one comparison
    near = distance.astype(jnp.uint32) < window.astype(jnp.uint32)
    return jnp.where(same & near, scores, flash.MASKED)
