"""Products with weights of 4- and 8-bit integers in groups, for Hopper GPUs (Pallas, Mosaic GPU).

A block of outputs is the left operand of wgmma, [64 outputs, inputs], which comes from registers,
and rows of x are the right one, of which 8 are enough. TMA brings words, x and scales to shared
memory, some steps of 128 inputs ahead. The weight is in no memory as floats.

Two codes of a word, half a word apart, become two bfloat16 numbers of one register by a shift and a
mask: the code is put into the mantissa of 128, from which it is taken as an exact number. For this
x comes with its inputs in the order in which registers hold the codes. The scale of a group
multiplies the sum over the group in float32, for any number of rows: no weight is rounded.

The inputs are divided among `splits` thread blocks for each block of outputs, so that they fill the
chip, and XLA adds their results.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8, UInt32

from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import Ref, pad, round_up
from qwen_jax.kernels.grouped_xla import PIECES, pieces_of

NAME = "grouped_hopper"
_DEPTH = 128  # inputs of a step
_TILE = 64  # outputs of a wgmma
_UNIT = 8  # words that four threads of a warp hold of an output, two of each
_LEAST_SIZE = 16  # inputs of a group
# The most rows of a thread block, and for groups smaller than a unit, which take more registers.
_MOST_ROWS, _FEWER_ROWS = 64, 16
_COLUMNS = 128  # outputs of a thread block
_BLOCKS = 264  # two for each multiprocessor, as many as fit with the most rows
_LEAST_STEPS = 4  # of a thread block, for each of which results are written
_STAGES = 3  # steps of which shared memory holds the data
# Layouts in registers: of words [words, 64], in an order that meets no bank conflict (`_joined`);
# of sums [64, rows], two neighbours apart; and of one number for each output.
_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((_UNIT, 64), (_UNIT, 16), (_UNIT, 8), (4, 8), (2, 8), (1,))),
    warp_dims=(-10,), lane_dims=(-2, -7, -3), vector_dim=-1,
)  # fmt: skip
_SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))),
    warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1,
)  # fmt: skip
_OUTPUT = plgpu.Layout.WGMMA.reduce(1)
_Sums = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


class HopperShape(NamedTuple):
    """The sizes by which the kernel divides its work.

    outputs, bits: of the weight.
    size: inputs of a group.
    rows: the rows of x in bfloat16.
    block: rows of a thread block.
    steps: of 128 inputs each, the last of which may have fewer.
    splits: thread blocks among which the steps of a block of outputs are divided.
    """

    outputs: int
    bits: int
    size: int
    rows: int
    block: int
    steps: int
    splits: int

    @property
    def places(self) -> int:
        """The number of codes in a word."""
        return 32 // self.bits

    @property
    def unit(self) -> int:
        """The inputs of the words that the threads of an output hold together."""
        return _UNIT * self.places

    @property
    def parts(self) -> int:
        """The number of groups of a step, at least one."""
        return max(1, _DEPTH // self.size)

    @property
    def width(self) -> int:
        """The columns of x for a group of a step: its inputs, and zeros for others of a unit."""
        return max(min(self.size, _DEPTH), self.unit)

    @property
    def half(self) -> int:
        """The number that is taken from each code."""
        return 2 ** (self.bits - 1)


def hopper_product(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
    dtype: DTypeLike | None = None,
    interpret: Any = None,
    splits: int | None = None,
) -> Float[Array, "B out"]:
    """Multiply rows by a weight whose elements are (code - zero) * scale.

    x: [B, in], bfloat16, float16 or float32.
    codes: uint32 [in * bits / 32, out]; a word holds successive inputs, the first in its lowest
        bits.
    scales: float16 or float32 [groups, out]; all groups have the same number of inputs.
    zeros: uint8 [groups, out]; None where all are 2^(bits - 1).
    bits: 4 or 8.
    dtype: of the result; None for x's.
    interpret: parameters of jax's emulation, or None to run on a GPU.
    splits: thread blocks among which the inputs are divided; None chooses a number.

    Products are exact, and their sums are in float32. Raises NotImplementedError for a shape, dtype
    or device that the kernel does not support.
    """
    here = choice.device()
    if interpret is None and not choice.is_hopper(here):
        raise NotImplementedError(f"{NAME} is for Hopper GPUs, this is {here.device_kind}")
    if x.dtype.name not in PIECES:
        raise NotImplementedError(f"{NAME}: dtype {x.dtype.name}, only {', '.join(PIECES)}")
    shape = shape_of(x, codes, scales, bits=bits, splits=splits)
    dtype = dtype or x.dtype
    whole = shape.splits == 1 and shape.rows == x.shape[0]
    result = jax.ShapeDtypeStruct(
        (shape.splits, shape.rows, shape.outputs), dtype if whole else jnp.float32
    )
    tables = [scales] if zeros is None else [scales, zeros]
    minor = min(shape.width, 64)  # columns of x in a row of a swizzled tile
    y = plgpu.kernel(
        functools.partial(_kernel, shape, interpret is not None),
        out_type=result,
        scratch_types={
            "word_tiles": _matrix((_STAGES, _DEPTH // shape.places, _COLUMNS), jnp.uint32, 16),
            "x_tiles": _matrix(
                (_STAGES, shape.block, shape.parts * shape.width), jnp.bfloat16, minor
            ),
            "table_tiles": [
                plgpu.SMEM((_STAGES, shape.parts, _COLUMNS), table.dtype) for table in tables
            ],
            "y_tile": plgpu.SMEM((shape.block, _TILE), result.dtype),
            "filled": plgpu.Barrier(num_arrivals=2 + len(tables), num_barriers=_STAGES),
        },
        # Blocks of rows with the same words are neighbours: all but one read from the L2 cache.
        grid=(pl.cdiv(shape.outputs, _COLUMNS), shape.splits, pl.cdiv(shape.rows, shape.block)),
        grid_names=("columns", "splits", "rows"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name=NAME,
    )(_arranged(shape, x), codes, tables)
    if whole:
        return y[0]
    return jnp.sum(y.reshape(-1, x.shape[0], shape.outputs), 0).astype(dtype)


def shape_of(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    scales: Float[Array, "groups out"],
    *,
    bits: int,
    splits: int | None = None,
) -> HopperShape:
    """Choose the sizes by which the kernel divides its work; arguments are `hopper_product`'s.

    Raises NotImplementedError for a shape that the kernel does not support.
    """
    if bits not in (4, 8):
        raise NotImplementedError(f"{NAME}: {bits} bits, only 4 and 8")
    groups, (inputs, outputs) = scales.shape[0], (x.shape[1], codes.shape[1])
    size = inputs // groups if groups > 1 else round_up(inputs, _DEPTH)
    if (size % _DEPTH and _DEPTH % size) or size < _LEAST_SIZE:
        raise NotImplementedError(
            f"{NAME}: groups of {size} inputs, only 16, 32, 64 and multiples of {_DEPTH}"
        )
    unit = _UNIT * 32 // bits
    for name, number, least in (("outputs", outputs, 16), ("inputs", inputs, unit)):
        if number % least:  # whole tiles of words, for TMA
            raise NotImplementedError(f"{NAME}: {number} {name}, only multiples of {least}")
    rows = x.shape[0] * PIECES[x.dtype.name]
    block = min(round_up(rows, 8), _MOST_ROWS if size >= unit else _FEWER_ROWS)
    steps = pl.cdiv(inputs, _DEPTH)
    if splits is None:
        wanted = pl.cdiv(_BLOCKS, pl.cdiv(rows, block) * pl.cdiv(outputs, _COLUMNS))
        splits = max(1, min(wanted, steps // _LEAST_STEPS))
    return HopperShape(outputs, bits, size, rows, block, steps, splits)


def _matrix(shape: tuple[int, ...], dtype: DTypeLike, minor: int) -> Any:
    """Return shared memory for matrices, in swizzled tiles of 8 rows and `minor` columns."""
    swizzle = minor * jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _arranged(shape: HopperShape, x: jax.Array) -> jax.Array:
    """Return x in bfloat16 [rows, steps * parts * width], its inputs in the order of `_joined`.

    Where groups are smaller than a unit, each has a copy of the unit, without the inputs of others.
    """
    x = pad(pieces_of(x), shape.steps * _DEPTH, axis=1)
    if shape.size < shape.unit:
        alike = jnp.arange(shape.unit) // shape.size
        of_group = alike == jnp.arange(shape.unit // shape.size)[:, None]
        x = jnp.where(of_group, x.reshape(shape.rows, -1, 1, shape.unit), 0)
    x = x.reshape(shape.rows, -1, 2, 2, 2, 2, shape.places // 2)  # words as in `_joined`, halves
    x = jnp.transpose(x, (0, 1, 3, 6, 2, 4, 5)).reshape(shape.rows, -1)
    return pad(x, round_up(shape.rows, 8), axis=0)  # the height of a tile in shared memory


def _kernel(
    shape: HopperShape,
    interpret: bool,
    x: Ref,
    codes: Ref,
    tables: list[Ref],
    y: Ref,
    *,
    word_tiles: Ref,
    x_tiles: Ref,
    table_tiles: list[Ref],
    y_tile: Ref,
    filled: Ref,
) -> None:
    """Compute some columns of the product of some rows, over some of the inputs.

    x: bfloat16 [rows, steps * parts * width], from `_arranged`.
    codes: uint32 [words, outputs].
    tables: the scales, or scales and zeros, [groups, outputs].
    y: [splits, rows, outputs].

    Arguments after these are shared memory, and the barriers of its stages.
    """
    column = lax.axis_index("columns") * _COLUMNS
    columns = pl.ds(column, _COLUMNS)
    rows = pl.ds(lax.axis_index("rows") * shape.block, shape.block)
    split = lax.axis_index("splits")
    first, after = (lax.div((split + k) * shape.steps, jnp.int32(shape.splits)) for k in (0, 1))
    words, depth = word_tiles.shape[1], x_tiles.shape[2]

    def fetch(i: jax.Array, slot: jax.Array | int) -> None:
        """Begin to copy the data of a step, if there is one."""

        @pl.when(i < after)
        def _() -> None:
            group = i * shape.parts if shape.parts > 1 else lax.div(i * _DEPTH, shape.size)
            for source, target in (
                (codes.at[pl.ds(i * words, words), columns], word_tiles),
                (x.at[rows, pl.ds(i * depth, depth)], x_tiles),
                *((t.at[pl.ds(group, shape.parts), columns], tile)
                  for t, tile in zip(tables, table_tiles, strict=True)),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(source, target.at[slot], filled.at[slot])

    def of_outputs(tile: Ref, slot: jax.Array, part: int, at: int) -> jax.Array:
        """Load a table's numbers for 64 outputs of a group, in float32."""
        numbers = tile.at[slot, part, pl.ds(at, _TILE)][...]
        return plgpu.layout_cast(numbers, _OUTPUT).astype(jnp.float32)

    def step(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        """Add the product with 128 inputs to the totals [64 outputs, rows]."""
        slot = lax.rem(i - first, jnp.int32(_STAGES))
        plgpu.barrier_wait(filled.at[slot])
        results = []
        for at, total in zip(range(0, _COLUMNS, _TILE), totals, strict=True):
            some = word_tiles.at[slot, :, pl.ds(at, _TILE)][...]
            weights = _unpacked(shape, plgpu.layout_cast(some, _WORDS), interpret)
            for part in range(shape.parts):
                start = part * shape.size // shape.unit * shape.unit
                weight = weights[:, start : start + shape.width]
                if len(tables) > 1:
                    zero = of_outputs(table_tiles[1], slot, part, at) - shape.half
                    weight -= _along_rows(zero.astype(jnp.bfloat16), shape.width)
                some_x = x_tiles.at[slot, :, pl.ds(part * shape.width, shape.width)]
                product = _product(weight, some_x)
                scale = of_outputs(table_tiles[0], slot, part, at)
                total += product * _along_rows(scale, shape.block)
            results.append(total)
        fetch(i + _STAGES, slot)
        return results

    for stage in range(_STAGES):
        fetch(first + stage, stage)
    zero = plgpu.layout_cast(jnp.zeros((_TILE, shape.block), jnp.float32), plgpu.Layout.WGMMA)
    totals = lax.fori_loop(first, after, step, [zero] * (_COLUMNS // _TILE))
    for at, total in zip(range(0, _COLUMNS, _TILE), totals, strict=True):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        turned = y_tile.at[:, :].T
        turned[...] = plgpu.layout_cast(total, _SINGLE).astype(y.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, y.at[split, rows, pl.ds(column + at, _TILE)])
    plgpu.wait_smem_to_gmem(0)


def _unpacked(shape: HopperShape, words: jax.Array, interpret: bool) -> jax.Array:
    """Return code - shape.half of words [words, 64], in bfloat16 [64, inputs] for wgmma."""
    shifted = [words >> jnp.uint32(shape.bits * j) for j in range(shape.places // 2)]
    joined = functools.partial(_joined, interpret=interpret)
    if shape.bits == 4:  # 128 + code, from which 128 + 8 is taken
        return joined([x & 0x000F000F | 0x43004300 for x in shifted]) - jnp.bfloat16(136)
    # 128 + the lower seven bits, from which 128 is taken where the highest is set, or else 256
    lower = joined([x & 0x007F007F | 0x43004300 for x in shifted])
    return lower - joined([x & 0x00800080 ^ 0x43804380 for x in shifted])


def _joined(pairs: list[jax.Array], *, interpret: bool) -> jax.Array:
    """Return bfloat16 [64, 2 * pairs * words], whose numbers are the halves of uint32 [words, 64].

    Four threads hold the eight words of a unit: with bits abc of a word's place, thread ac holds it
    as its word b. Columns are ordered by the unit, b, the pair, ac, and the half. No number changes
    its thread.
    """
    words, outputs = pairs[0].shape
    wide = (outputs, 2 * len(pairs) * words)
    if interpret:
        halves = lax.bitcast_convert_type(jnp.stack(pairs), jnp.bfloat16)
        halves = halves.reshape(len(pairs), -1, 2, 2, 2, outputs, 2)
        return jnp.transpose(halves, (5, 1, 3, 0, 2, 4, 6)).reshape(wide)

    @plgpu.inline_mgpu(
        arg_types=[_WORDS] * len(pairs),
        return_type=plgpu.ShapeDtypeStruct(wide, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def join(_: Any, *pairs: Any) -> Any:
        layout = mgpu.WGMMA_LAYOUT
        kind = layout.registers_element_type(utils.dtype_to_ir_type(jnp.bfloat16))
        registers = in_order([pair.registers for pair in pairs])
        for at, x in np.ndenumerate(registers):
            registers[at] = utils.bitcast(x, kind)
        registers = registers.reshape(layout.registers_shape(wide))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return join(*pairs)


def in_order(pairs: list[np.ndarray]) -> np.ndarray:
    """Return a thread's registers [8 columns each, two outputs] of what `_joined` makes.

    pairs: the registers of each pair, [units, two outputs, two words] without axes of one.
    """
    registers = np.stack([pair.reshape(-1, 2, 2) for pair in pairs])
    return np.transpose(registers, (1, 3, 0, 2)).reshape(-1, 2)


def _product(weight: jax.Array, x: Ref) -> jax.Array:
    """Return the product of weight [64, inputs] and x [rows, inputs], [64, rows] in float32."""

    def body(sums: Ref) -> jax.Array:
        plgpu.wgmma(sums, weight, x.T)
        return sums[...]

    return pl.run_scoped(body, _Sums((_TILE, x.shape[0]), jnp.float32))


def _along_rows(x: jax.Array, columns: int) -> jax.Array:
    """Broadcast x [64], one number for each output, to [64, columns]."""
    return lax.broadcast_in_dim(x, (_TILE, columns), (0,))
