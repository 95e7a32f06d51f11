"""Flash attention for Hopper GPUs (H100, H200), forward and backward, in Pallas Mosaic GPU.

A thread block has three warpgroups. One issues the TMA copies of the blocks that the thread block
walks over, and two compute on 64 rows each. In the forward pass these two take turns, so that the
exponentials of one run during the matrix products of the other. All three walk the visible blocks
by the same rule, computed from the positions and segments in blocks, so they exchange only full and
empty buffers. Lengths need not be multiples of a block, as TMA reads zeros beyond the end of an
array and writes nothing beyond it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen_jax.kernels import choice, flash
from qwen_jax.kernels.flash import Attended, KeysOrValues, Ref, Scale
from qwen_jax.kernels.mask import Mask

NAME = "pallas_hopper"
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (128,)
_ROWS = 64  # rows of a computing warpgroup: the height of a wgmma
_TILE = 2 * _ROWS  # rows of a thread block
_EMPTY, _PARTLY, _FULL = 0, 1, 2
_SIGN = jnp.iinfo(jnp.int32).min
_L2 = 2**25  # bytes to fill of the L2 cache, which is half as large again
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24
_Sums = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# Layouts of one value per column, and of one per row, of a wgmma accumulator.
_COLUMN, _ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Hopper:
    """The `flash.Body` for Hopper GPUs, with the block sizes of its three kernels.

    block, dq_block: keys in a block that a tile of queries walks over, forward and for dq.
    dkv_block: queries in a block that a tile of keys walks over, for dk and dv.
    stages, dq_stages, dkv_stages: how many of these blocks shared memory holds at once.
    interpret: parameters of jax's emulation, or None to run on a GPU.
    """

    block: int = 128
    stages: int = 2
    dq_block: int = 128
    dq_stages: int = 2
    dkv_block: int = 64
    dkv_stages: int = 3
    interpret: Any = None

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: jax.Array,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute o and the log-sum-exp by a Mosaic GPU kernel, as `flash.Body.forward` says."""
        length = q.shape[1]
        q, k, v = (_even(x) for x in (flash.factored(q, scale), k, v))
        batch, _, heads, dim = q.shape
        group = heads // k.shape[2]
        queries = flash.round_up(length, _TILE)
        mask = flash.padded_mask(mask, queries=queries, keys=flash.round_up(k.shape[1], self.block))
        blocks = _matrix((self.stages, self.block, dim), q.dtype)
        o, lse = self._kernel(
            functools.partial(_forward, group=group),
            "flash_forward",
            [
                jax.ShapeDtypeStruct(q.shape, dtype),
                jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
            ],
            (batch, heads, queries // _TILE, group * _together(k)),
            {
                "q_tile": _matrix((2, _ROWS, dim), q.dtype),
                "o_tile": _matrix((2, _ROWS, dim * 2 // jnp.dtype(dtype).itemsize), dtype),
                "lse_tile": plgpu.SMEM((2, _ROWS), jnp.float32),
                "q_places": plgpu.SMEM((2, 2, _ROWS), jnp.int32),
                "k_blocks": blocks,
                "v_blocks": blocks,
                "k_places": plgpu.SMEM((self.stages, 2, self.block), jnp.int32),
                "q_filled": plgpu.Barrier(num_arrivals=2, num_barriers=2),
                "k_filled": plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
                "v_filled": plgpu.Barrier(num_barriers=self.stages),
                "k_emptied": plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
                "v_emptied": plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
                "turn": plgpu.Barrier(num_arrivals=2),
            },
        )(_plan(mask, self.block), q, k, v, *flash.places(mask))
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
        length, keys = q.shape[1], k.shape[1]
        q, k, v, do = (_even(x) for x in (flash.factored(q, scale), k, v, do))
        queries = flash.round_up(length, _TILE)
        mask = flash.padded_mask(mask, queries=queries, keys=flash.round_up(keys, _TILE))
        stats = jnp.transpose(jnp.stack([lse * flash.LOG2E, delta]), (1, 3, 0, 2))  # [B, N, 2, T]
        stats, scales = flash.pad(stats, queries, axis=3), flash.pad(scale, queries, axis=1)
        operands = q, k, v, *flash.places(mask), do, stats
        dq = self._backward_queries(mask, *operands, scales)
        dk, dv = self._backward_keys(mask, *operands)
        return dq[:, :length], dk[:, :keys], dv[:, :keys]

    def _backward_queries(self, mask: Mask, *operands: jax.Array) -> jax.Array:
        """Compute dq [B, T, N, H] by the backward kernel over tiles of queries.

        operands: q (as from `flash.factored`), k, v, the arrays of `flash.places`, do, stats
            (log-sum-exp in base 2, and delta) and scale.
        """
        q, k = operands[:2]
        batch, _, heads, dim = q.shape
        group = heads // k.shape[2]
        block, stages = self.dq_block, self.dq_stages
        tile = _matrix((2, _ROWS, dim), q.dtype)
        blocks = _matrix((stages, block, dim), q.dtype)
        return self._kernel(
            functools.partial(_backward_queries, group=group),
            "flash_backward_queries",
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            (batch, heads, mask.q_positions.shape[1] // _TILE, group * _together(k)),
            {
                "q_tile": tile,
                "do_tile": tile,
                "stats_tile": plgpu.SMEM((2, 2, _ROWS), jnp.float32),
                "scale_tile": plgpu.SMEM((2, _ROWS), jnp.float32),
                "q_places": plgpu.SMEM((2, 2, _ROWS), jnp.int32),
                "k_blocks": blocks,
                "v_blocks": blocks,
                "k_places": plgpu.SMEM((stages, 2, block), jnp.int32),
                "q_filled": plgpu.Barrier(num_arrivals=5, num_barriers=2),
                "filled": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
                "emptied": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            },
        )(_plan(mask, block), *operands)

    def _backward_keys(self, mask: Mask, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute dk and dv [B, S, K, H] by the backward kernel over tiles of keys.

        operands: q (as from `flash.factored`), k, v, the arrays of `flash.places`, do and stats
            (log-sum-exp in base 2, and delta).
        """
        q, k = operands[:2]
        batch, _, heads, dim = k.shape
        group = q.shape[2] // heads
        block, stages = self.dkv_block, self.dkv_stages
        tile = _matrix((2, _ROWS, dim), q.dtype)
        blocks = _matrix((stages, block, dim), q.dtype)
        return self._kernel(
            functools.partial(_backward_keys, group=group),
            "flash_backward_keys",
            [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
            (batch, heads, mask.k_positions.shape[1] // _TILE, _together(q, group)),
            {
                "k_tile": tile,
                "v_tile": tile,
                "k_places": plgpu.SMEM((2, 2, _ROWS), jnp.int32),
                "q_blocks": blocks,
                "do_blocks": blocks,
                "stats_blocks": plgpu.SMEM((stages, 2, block), jnp.float32),
                "q_places": plgpu.SMEM((stages, 2, block), jnp.int32),
                "k_filled": plgpu.Barrier(num_arrivals=3, num_barriers=2),
                "filled": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
                "emptied": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            },
        )(_plan(mask, block, over_queries=True), *operands)

    def _kernel(
        self,
        body: Callable[..., None],
        name: str,
        out_type: Any,
        size: tuple[int, int, int, int],
        scratch: dict[str, Any],
    ) -> Callable[..., Any]:
        """Make a kernel from a function that every warpgroup runs.

        body: the function, which takes operands, outputs and scratch memory.
        out_type: the shapes and dtypes of the outputs.
        size: batch, heads, tiles, and the number of heads that run side by side. The last axis of a
            grid varies fastest.
        scratch: shared memory and barriers, by the name of the function's argument.
        """
        batch, heads, tiles, together = size
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch,
            grid=(batch, heads // together, tiles, together),
            grid_names=("batch", "parts", "tiles", "heads"),
            num_threads=3,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            interpret=self.interpret,
            kernel_name=name,
        )


def hopper_attention(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> Attended:
    """Attend on a Hopper GPU. Arguments and results are those of `attention.xla`.

    known: o and log-sum-exp over all keys, if k and v are a part of them (`flash.attend_through`).

    Raises NotImplementedError, with the reason, for calls that the kernel does not support.
    """
    here = choice.device()
    if not choice.is_hopper(here):
        raise NotImplementedError(f"{NAME} is for Hopper GPUs, this is {here.device_kind}")
    flash.decline(NAME, q, k=k, dtypes=DTYPES, head_dims=HEAD_DIMS)
    what: choice.Call = {"head_dim": q.shape[-1], "dtype": q.dtype.name, "length": k.shape[1]}
    sizes = choice.blocks(NAME, "forward", **what) | choice.blocks(NAME, "backward", **what)
    return flash.attend_through(Hopper(**sizes), q, k, v, mask, scale, return_lse, known)


class _Plan(NamedTuple):
    """The data by which a tile of queries (or keys) finds the blocks of keys (or queries) to visit.

    tiles, blocks: the fields of each tile's and each block's `flash.Extent`, int32 [B, 5, n].
    bounds: int32 [B, 2, tiles], the first visible block and one past the last.
    window: int32 [1].
    """

    tiles: Ref
    blocks: Ref
    bounds: Ref
    window: Ref


def _plan(mask: Mask, block: int, over_queries: bool = False) -> _Plan:
    """Plan which blocks of keys each tile of queries visits, or the reverse with over_queries.

    block: tokens in a block.
    """
    q = flash.extent(mask.q_positions, mask.q_segments, block=block if over_queries else _TILE)
    k = flash.extent(mask.k_positions, mask.k_segments, block=_TILE if over_queries else block)
    window = jnp.maximum(jnp.asarray(mask.window, jnp.int32), 0)
    tiles, blocks = (k, q) if over_queries else (q, k)
    along = flash.Extent(*(x[:, :, None] for x in tiles))
    across = flash.Extent(*(x[:, None, :] for x in blocks))
    # XLA makes these pairs inside the two reductions and holds none of them.
    seen = flash.visible(*((across, along) if over_queries else (along, across)), window=window)
    index = lax.broadcasted_iota(jnp.int32, seen.shape, 2)
    first = jnp.min(jnp.where(seen, index, seen.shape[2]), 2)
    beyond = jnp.max(jnp.where(seen, index + 1, 0), 2)
    return _Plan(
        jnp.stack(tiles, 1), jnp.stack(blocks, 1), jnp.stack([first, beyond], 1), window.reshape(1)
    )


def _together(x: jax.Array, group: int = 1) -> int:
    """Return how many groups of heads run side by side, so that their data stay in the L2 cache.

    x: [B, S, heads, H], one of the two arrays of this size over whose blocks tiles walk.
    group: heads in a group.

    The result divides the number of groups.
    """
    groups = x.shape[2] // group
    most = max(1, _L2 // (2 * x.shape[1] * group * x.shape[3] * x.dtype.itemsize))
    return max(n for n in range(1, groups + 1) if groups % n == 0 and n <= most)


def _even(x: jax.Array) -> jax.Array:
    """Pad x [B, T, heads, H] to a multiple of 8 tokens, the height of a shared-memory tile."""
    return flash.pad(x, flash.round_up(x.shape[1], 8), axis=1)


def _matrix(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Return shared memory for matrices, ordered for TMA and wgmma without bank conflicts."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The walk of one tile over the blocks that it visits, the same in each warpgroup.

    plan: the plan of the kernel.
    batch, tile: the indices of the sequence and of the tile.
    over_queries: whether the tile is of keys, and the blocks are of queries.
    """

    plan: _Plan
    batch: jax.Array
    tile: jax.Array
    over_queries: bool = False

    def run(self, visit: Callable[..., Any], state: Any) -> Any:
        """Apply state = visit(block, full, state) to the visible blocks in order.

        visit: takes the index of a block, and whether no score of the block is masked.
        state: the state before the first block.

        Returns the state after the last block.
        """
        first, beyond = (self.plan.bounds[self.batch, i, self.tile] for i in range(2))
        last = self.plan.blocks.shape[2] - 1

        def kind(block: jax.Array) -> jax.Array:
            # All are read again for each block, as a computing warpgroup is short of registers.
            window = self.plan.window[0]
            mine = self._extent(self.plan.tiles, self.tile)
            other = self._extent(self.plan.blocks, jnp.minimum(block, last))
            q, k = (other, mine) if self.over_queries else (mine, other)
            part = jnp.where(flash.full(q, k, window=window), _FULL, _PARTLY)
            return jnp.where(flash.visible(q, k, window=window), part, _EMPTY)

        def after(block: jax.Array) -> tuple[jax.Array, jax.Array]:
            block += 1
            return lax.while_loop(
                lambda x: (x[0] < beyond) & (x[1] == _EMPTY),
                lambda x: (x[0] + 1, kind(x[0] + 1)),
                (block, kind(block)),
            )

        def step(x: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
            block, which, state = x
            following = after(block)  # its loads are under way while this block is computed
            return (*following, visit(block, which == _FULL, state))

        start = first, kind(first), state
        return lax.while_loop(lambda x: x[0] < beyond, step, start)[2]

    def _extent(self, fields: Ref, index: jax.Array) -> flash.Extent:
        """Load the range of positions and segments of one tile or block.

        fields: the plan's `tiles` or `blocks`.
        """
        return flash.Extent(*(fields[self.batch, i, index] for i in range(5)))


def _forward(
    plan: _Plan,
    q: Ref,
    k: Ref,
    v: Ref,
    q_positions: Ref,
    k_positions: Ref,
    o: Ref,
    lse: Ref,
    *,
    group: int,
    q_tile: Ref,
    o_tile: Ref,
    lse_tile: Ref,
    q_places: Ref,
    k_blocks: Ref,
    v_blocks: Ref,
    k_places: Ref,
    q_filled: Ref,
    k_filled: Ref,
    v_filled: Ref,
    k_emptied: Ref,
    v_emptied: Ref,
    turn: Ref,
) -> None:
    """Compute o and the log-sum-exp of one tile of queries of one head.

    q: [B, T, N, H], as from `flash.factored`.
    k, v: [B, S, K, H].
    q_positions, k_positions: positions and segments, int32 [B, 2, n] each.
    o, lse: [B, T, N, H] and [B, N, T].
    group: the query heads of a key/value head.

    Arguments after `group` are shared memory, and barriers (`filled`, `emptied`, `turn`).
    """
    stages, block_k, dim = k_blocks.shape
    batch, head = lax.axis_index("batch"), _head()
    tile = plan.tiles.shape[2] - 1 - lax.axis_index("tiles")  # the longest of a causal mask first
    warpgroup = lax.axis_index("warpgroup")
    walk = _Walk(plan, batch, tile)
    factor = flash.score_factor(dim)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        key_head = lax.div(head, jnp.int32(group))

        def visit(block: jax.Array, _: jax.Array, count: jax.Array) -> jax.Array:
            slot, again = _slot(count, stages)
            keys = pl.ds(block * block_k, block_k)
            pl.when(again)(lambda: plgpu.barrier_wait(k_emptied.at[slot]))
            filled = k_filled.at[slot]
            plgpu.copy_gmem_to_smem(k.at[batch, keys, key_head], k_blocks.at[slot], filled)
            plgpu.copy_gmem_to_smem(k_positions.at[batch, :, keys], k_places.at[slot], filled)
            pl.when(again)(lambda: plgpu.barrier_wait(v_emptied.at[slot]))
            filled = v_filled.at[slot]
            plgpu.copy_gmem_to_smem(v.at[batch, keys, key_head], v_blocks.at[slot], filled)
            return count + 1

        walk.run(visit, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        rows = pl.ds(tile * _TILE + warpgroup * _ROWS, _ROWS)
        filled = q_filled.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[batch, rows, head], q_tile.at[warpgroup], filled)
        plgpu.copy_gmem_to_smem(q_positions.at[batch, :, rows], q_places.at[warpgroup], filled)
        plgpu.barrier_wait(filled)

        # The warpgroups meet at `turn` twice per block: once their score products are issued, and
        # once their exponentials are done. The second one starts a meeting late, so that each half
        # of its step coincides with the other half of the first one's.
        def take_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        pl.when(warpgroup == 1)(take_turn)

        def visit(block: jax.Array, full: jax.Array, state: Any) -> Any:
            count, largest, total, sums = state
            slot, _ = _slot(count, stages)
            plgpu.barrier_wait(k_filled.at[slot])
            (scores,) = _products((q_tile.at[warpgroup], k_blocks.at[slot].T), issued=take_turn)
            scores = _masked(scores, full, q_places.at[warpgroup], k_places.at[slot], plan.window)
            plgpu.barrier_arrive(k_emptied.at[slot])
            now = jnp.maximum(largest, jnp.max(scores, 1) * factor)
            weights = jnp.exp2(scores * factor - _along_rows(now, block_k))
            fading = jnp.exp2(largest - now)
            total = total * fading + jnp.sum(weights, 1)
            sums *= _along_rows(fading, dim)
            weights = weights.astype(v.dtype)
            # All of this has to be done before the turn passes.
            now, total, sums, weights = lax.optimization_barrier((now, total, sums, weights))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_filled.at[slot])
            plgpu.barrier_wait(turn)
            (sums,) = _accumulate((sums, weights, v_blocks.at[slot]))
            plgpu.barrier_arrive(v_emptied.at[slot])
            return count + 1, now, total, sums

        nothing = jnp.int32(0), _full_rows(flash.LOWEST), _full_rows(0), _zeros(dim)
        _, largest, total, sums = walk.run(visit, nothing)
        pl.when(warpgroup == 0)(take_turn)

        seen = total > 0
        divisor = jnp.where(seen, total, 1)
        value = largest / flash.LOG2E + jnp.log(divisor)
        lse_tile[warpgroup] = jnp.where(seen, value, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_tile.at[warpgroup], lse.at[batch, head, rows])
        result = (sums * _along_rows(1 / divisor, dim)).astype(o.dtype)
        width = o_tile.shape[2]  # float32 is written in halves, as shared memory holds no more
        for at in range(0, dim, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_tile[warpgroup] = result[:, at : at + width]
            plgpu.commit_smem()
            target = o.at[batch, rows, head, pl.ds(at, width)]
            plgpu.copy_smem_to_gmem(o_tile.at[warpgroup], target)
        plgpu.wait_smem_to_gmem(0)


def _backward_queries(
    plan: _Plan,
    q: Ref,
    k: Ref,
    v: Ref,
    q_positions: Ref,
    k_positions: Ref,
    do: Ref,
    stats: Ref,
    scale: Ref,
    dq: Ref,
    *,
    group: int,
    q_tile: Ref,
    do_tile: Ref,
    stats_tile: Ref,
    scale_tile: Ref,
    q_places: Ref,
    k_blocks: Ref,
    v_blocks: Ref,
    k_places: Ref,
    q_filled: Ref,
    filled: Ref,
    emptied: Ref,
) -> None:
    """Compute dq of one tile of queries of one head.

    q: [B, T, N, H], as from `flash.factored`.
    k, v: [B, S, K, H].
    q_positions, k_positions: positions and segments, int32 [B, 2, n] each.
    do, dq: [B, T, N, H].
    stats: float32 [B, N, 2, T], the log-sum-exp in base 2, and delta.
    scale: float32 [B, T].
    group: the query heads of a key/value head.

    Arguments after `group` are shared memory, and barriers (`filled`, `emptied`, `turn`).
    """
    stages, block_k, dim = k_blocks.shape
    batch, head = lax.axis_index("batch"), _head()
    tile = plan.tiles.shape[2] - 1 - lax.axis_index("tiles")
    warpgroup = lax.axis_index("warpgroup")
    walk = _Walk(plan, batch, tile)
    factor = flash.score_factor(dim)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        key_head = lax.div(head, jnp.int32(group))

        def visit(block: jax.Array, _: jax.Array, count: jax.Array) -> jax.Array:
            slot, again = _slot(count, stages)
            keys = pl.ds(block * block_k, block_k)
            pl.when(again)(lambda: plgpu.barrier_wait(emptied.at[slot]))
            full = filled.at[slot]
            plgpu.copy_gmem_to_smem(k.at[batch, keys, key_head], k_blocks.at[slot], full)
            plgpu.copy_gmem_to_smem(k_positions.at[batch, :, keys], k_places.at[slot], full)
            plgpu.copy_gmem_to_smem(v.at[batch, keys, key_head], v_blocks.at[slot], full)
            return count + 1

        walk.run(visit, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        rows = pl.ds(tile * _TILE + warpgroup * _ROWS, _ROWS)
        for source, target in (
            (q.at[batch, rows, head], q_tile),
            (do.at[batch, rows, head], do_tile),
            (stats.at[batch, head, :, rows], stats_tile),
            (scale.at[batch, rows], scale_tile),
            (q_positions.at[batch, :, rows], q_places),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[warpgroup], q_filled.at[warpgroup])
        plgpu.barrier_wait(q_filled.at[warpgroup])
        lse = _load(stats_tile.at[warpgroup, 0], _ROW)
        delta = _load(stats_tile.at[warpgroup, 1], _ROW)

        def visit(block: jax.Array, full: jax.Array, state: Any) -> Any:
            count, sums = state
            slot, _ = _slot(count, stages)
            plgpu.barrier_wait(filled.at[slot])
            scores, slopes = _products(
                (q_tile.at[warpgroup], k_blocks.at[slot].T),
                (do_tile.at[warpgroup], v_blocks.at[slot].T),
            )
            scores = _masked(scores, full, q_places.at[warpgroup], k_places.at[slot], plan.window)
            weights = jnp.exp2(scores * factor - _along_rows(lse, block_k))
            slopes = weights * (slopes - _along_rows(delta, block_k))
            (sums,) = _accumulate((sums, slopes.astype(k.dtype), k_blocks.at[slot]))
            plgpu.barrier_arrive(emptied.at[slot])
            return count + 1, sums

        _, sums = walk.run(visit, (jnp.int32(0), _zeros(dim)))
        sums *= _along_rows(_load(scale_tile.at[warpgroup], _ROW), dim)
        q_tile[warpgroup] = sums.astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], dq.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)


def _backward_keys(
    plan: _Plan,
    q: Ref,
    k: Ref,
    v: Ref,
    q_positions: Ref,
    k_positions: Ref,
    do: Ref,
    stats: Ref,
    dk: Ref,
    dv: Ref,
    *,
    group: int,
    k_tile: Ref,
    v_tile: Ref,
    k_places: Ref,
    q_blocks: Ref,
    do_blocks: Ref,
    stats_blocks: Ref,
    q_places: Ref,
    k_filled: Ref,
    filled: Ref,
    emptied: Ref,
) -> None:
    """Compute dk and dv of one tile of keys of one head.

    Scores are [keys, queries] here, so dk and dv are sums over columns.

    q: [B, T, N, H], as from `flash.factored`.
    k, v, dk, dv: [B, S, K, H].
    q_positions, k_positions: positions and segments, int32 [B, 2, n] each.
    do: [B, T, N, H].
    stats: float32 [B, N, 2, T], the log-sum-exp in base 2, and delta.
    group: the query heads of a key/value head.

    Arguments after `group` are shared memory, and barriers (`filled`, `emptied`, `turn`).
    """
    stages, block_q, dim = q_blocks.shape
    batch, head = lax.axis_index("batch"), _head()
    tile = lax.axis_index("tiles")
    warpgroup = lax.axis_index("warpgroup")
    walk = _Walk(plan, batch, tile, over_queries=True)
    factor = flash.score_factor(dim)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        def over(member: jax.Array, count: jax.Array) -> jax.Array:
            query_head = head * group + member

            def visit(block: jax.Array, _: jax.Array, count: jax.Array) -> jax.Array:
                slot, again = _slot(count, stages)
                rows = pl.ds(block * block_q, block_q)
                pl.when(again)(lambda: plgpu.barrier_wait(emptied.at[slot]))
                for source, target in (
                    (q.at[batch, rows, query_head], q_blocks),
                    (do.at[batch, rows, query_head], do_blocks),
                    (stats.at[batch, query_head, :, rows], stats_blocks),
                    (q_positions.at[batch, :, rows], q_places),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], filled.at[slot])
                return count + 1

            return walk.run(visit, count)

        lax.fori_loop(0, group, over, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        keys = pl.ds(tile * _TILE + warpgroup * _ROWS, _ROWS)
        for source, target in (
            (k.at[batch, keys, head], k_tile),
            (v.at[batch, keys, head], v_tile),
            (k_positions.at[batch, :, keys], k_places),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[warpgroup], k_filled.at[warpgroup])
        plgpu.barrier_wait(k_filled.at[warpgroup])

        def visit(block: jax.Array, full: jax.Array, state: Any) -> Any:
            count, dk_sums, dv_sums = state
            slot, _ = _slot(count, stages)
            plgpu.barrier_wait(filled.at[slot])
            (scores,) = _products((k_tile.at[warpgroup], q_blocks.at[slot].T))
            scores = _masked(
                scores, full, q_places.at[slot], k_places.at[warpgroup], plan.window, turned=True
            )
            lse = _load(stats_blocks.at[slot, 0], _COLUMN)
            weights = jnp.exp2(scores * factor - _along_columns(lse))
            dv_sums, slopes = _accumulate(
                (dv_sums, weights.astype(do.dtype), do_blocks.at[slot]),
                (_zeros(block_q), v_tile.at[warpgroup], do_blocks.at[slot].T),
            )
            delta = _load(stats_blocks.at[slot, 1], _COLUMN)
            slopes = weights * (slopes - _along_columns(delta))
            (dk_sums,) = _accumulate((dk_sums, slopes.astype(q.dtype), q_blocks.at[slot]))
            plgpu.barrier_arrive(emptied.at[slot])
            return count + 1, dk_sums, dv_sums

        nothing = jnp.int32(0), _zeros(dim), _zeros(dim)
        _, dk_sums, dv_sums = lax.fori_loop(
            0, group, lambda _, state: walk.run(visit, state), nothing
        )
        k_tile[warpgroup] = (dk_sums * (factor / flash.LOG2E)).astype(dk.dtype)
        v_tile[warpgroup] = dv_sums.astype(dv.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile.at[warpgroup], dk.at[batch, keys, head])
        plgpu.copy_smem_to_gmem(v_tile.at[warpgroup], dv.at[batch, keys, head])
        plgpu.wait_smem_to_gmem(0)


def _head() -> jax.Array:
    """Return the index of the head that this thread block computes."""
    return lax.axis_index("parts") * lax.axis_size("heads") + lax.axis_index("heads")


def _slot(count: jax.Array, stages: int) -> tuple[jax.Array, jax.Array]:
    """Return the buffer's index for the count-th block, and whether it has held another before."""
    return lax.rem(count, jnp.int32(stages)), count >= stages


def _products(*pairs: tuple[Ref, Ref], issued: Callable[[], None] | None = None) -> list[jax.Array]:
    """Compute the matrix product a b of each pair (a, b) in float32.

    issued: a function to call while the products are computed, or None.
    """

    def body(*sums: Ref) -> list[jax.Array]:
        for ref, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(ref, a, b)
        if issued is not None:
            issued()
        return [ref[...] for ref in sums]

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(body, *(_Sums(shape, jnp.float32) for shape in shapes))


def _accumulate(*parts: tuple[jax.Array, Ref, Ref]) -> list[Any]:
    """Return sums plus the matrix product a b for each (sums, a, b)."""

    def body(refs: list[Ref]) -> None:
        for ref, (_, a, b) in zip(refs, parts, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(body)([_Sums.init(sums) for sums, _, _ in parts])


def _masked(
    scores: jax.Array,
    full: jax.Array,
    q_places: Ref,
    k_places: Ref,
    window: Ref,
    turned: bool = False,
) -> jax.Array:
    """Set scores [queries, keys] to `flash.MASKED` where the mask hides a key.

    full: whether the mask hides no key of the block.
    q_places, k_places: positions and segments of the queries, and of the keys.
    turned: whether the scores are [keys, queries] instead.
    """

    def masked(scores: jax.Array) -> jax.Array:
        q_layout, q_axis, k_layout, k_axis = (
            (_COLUMN, 1, _ROW, 0) if turned else (_ROW, 0, _COLUMN, 1)
        )

        def of(places: Ref, i: int, layout: Any, axis: int, shift: int = 0) -> jax.Array:
            return lax.broadcast_in_dim(_load(places.at[i], layout) + shift, scores.shape, (axis,))

        same = of(q_places, 1, q_layout, q_axis) == of(k_places, 1, k_layout, k_axis)
        # 0 <= distance < window by one comparison: shifting both sides by 2**31 makes it unsigned.
        distance = of(q_places, 0, q_layout, q_axis, _SIGN) - of(k_places, 0, k_layout, k_axis)
        return jnp.where(same & (distance < window[0] + _SIGN), scores, flash.MASKED)

    return lax.cond(full, lambda x: x, masked, scores)


def _load(ref: Ref, layout: Any) -> jax.Array:
    """Load an array from shared memory into registers, in a layout of Mosaic GPU."""
    return plgpu.layout_cast(ref[...], layout)


def _along_rows(x: jax.Array, columns: int) -> jax.Array:
    """Broadcast x [64], one value for each row, to [64, columns]."""
    return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))


def _along_columns(x: jax.Array) -> jax.Array:
    """Broadcast x [columns], one value for each column, to [64, columns]."""
    return lax.broadcast_in_dim(x, (_ROWS, x.shape[0]), (1,))


def _full_rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _ROW)


def _zeros(columns: int) -> jax.Array:
    zeros = jnp.zeros((_ROWS, columns), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
