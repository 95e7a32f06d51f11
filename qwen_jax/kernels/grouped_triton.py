"""Products with weights of 4- and 8-bit integers in groups, for NVIDIA GPUs (Pallas, Triton).

A product of few rows takes as long as reading the weight does, and it is read once for up to 64 of
them; the weight is in no memory as floats. Words go to registers in the order
of a GPTQ file, and become bfloat16 there, where such small integers are exact: four bits by way of
16 + code, whose mantissa holds the code, eight by way of 2^23 + code in float32. Rows of other
dtypes than bfloat16 are cut into two or three of bfloat16, whose sum they are. The scale of a group
multiplies the sum over the group, in float32.

Place j of the words of a group makes a product of its own, with every eighth input (every fourth,
of eight bits), so that codes are never moved between threads. The inputs are divided among
`splits` programs for each block of outputs, so that they fill the chip, and XLA adds their results.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8, UInt32

from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import Ref, pad, round_up
from qwen_jax.kernels.grouped_xla import PIECES, pieces_of

NAME = "grouped_triton"
# The least and the most rows of a product of tensor cores, and the most for groups of fewer than
# 128 inputs, which take more registers.
_ROWS, _FEWER_ROWS = (16, 64), 32
_DEPTH = 128  # inputs of a step
_COLUMNS = (64, 128)  # outputs of a program: fewer where more would not fit into registers
_PROGRAMS = 512  # several for each multiprocessor of any chip
_LEAST_STEPS = 4  # of a program, for each of which results are written


class TritonShape(NamedTuple):
    """The sizes by which the kernel divides its work.

    inputs, outputs, groups, bits: of the weight.
    size: inputs of a group.
    rows: the rows of x in bfloat16.
    block, columns: rows and outputs of a program.
    row_blocks: programs among which all rows are divided.
    steps: of 128 inputs each, the last of which may have fewer.
    splits: programs among which the steps of a block of outputs are divided.
    """

    inputs: int
    outputs: int
    groups: int
    bits: int
    size: int
    rows: int
    block: int
    columns: int
    row_blocks: int
    steps: int
    splits: int

    @property
    def places(self) -> int:
        """The number of codes in a word."""
        return 32 // self.bits

    @property
    def words(self) -> int:
        """The number of words of a step."""
        return _DEPTH // self.places

    @property
    def parts(self) -> int:
        """The number of groups of a step, at least one."""
        return max(1, _DEPTH // self.size)

    @property
    def half(self) -> int:
        """The number that is taken from each code."""
        return 2 ** (self.bits - 1)


def triton_product(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
    dtype: DTypeLike | None = None,
    interpret: bool | None = None,
    splits: int | None = None,
    warps: int | None = None,
    stages: int = 4,
) -> Float[Array, "B out"]:
    """Multiply rows by a weight whose elements are (code - zero) * scale.

    x: [B, in], bfloat16, float16 or float32.
    codes: uint32 [in * bits / 32, out]; a word holds successive inputs, the first in its lowest
        bits.
    scales: float16 or float32 [groups, out]; all groups have the same number of inputs.
    zeros: uint8 [groups, out]; None where all are 2^(bits - 1).
    bits: 4 or 8.
    dtype: of the result; None for x's.
    interpret: whether to interpret the kernel; None does so on a CPU only.
    splits: programs among which the inputs are divided; None chooses a number.
    warps, stages: the warps and pipeline stages of a program, as in Triton.

    Products are exact, and their sums are in float32. Raises NotImplementedError for a shape, dtype
    or device that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "gpu") if interpret is None else interpret
    choice.need_gpu(NAME, 7.5)
    if x.dtype.name not in PIECES:
        raise NotImplementedError(f"{NAME}: dtype {x.dtype.name}, only {', '.join(PIECES)}")
    shape = shape_of(x, codes, scales, bits=bits, splits=splits)
    warps = warps or (4 if shape.block == _ROWS[0] else 8)
    arranged, sums = _arrange(shape, x)
    dtype = dtype or x.dtype
    whole = shape.splits == 1 and shape.rows == x.shape[0]
    y = pl.pallas_call(
        functools.partial(_kernel, shape, interpret),
        out_shape=jax.ShapeDtypeStruct(
            (shape.splits, shape.rows, shape.outputs), dtype if whole else jnp.float32
        ),
        # Blocks of rows with the same words are neighbours: all but one read from the L2 cache.
        grid=(shape.row_blocks, pl.cdiv(shape.outputs, shape.columns), shape.splits),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=NAME,
    )(arranged, codes, [scales] if zeros is None else [scales, zeros, sums])
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
) -> TritonShape:
    """Choose the sizes by which the kernel divides its work; arguments are `triton_product`'s.

    Raises NotImplementedError for a shape that the kernel does not support.
    """
    groups = scales.shape[0]
    if bits not in (4, 8):
        raise NotImplementedError(f"{NAME}: {bits} bits, only 4 and 8")
    inputs, outputs = x.shape[1], codes.shape[1]
    size = inputs // groups if groups > 1 else round_up(inputs, _DEPTH)
    if (size % _DEPTH and _DEPTH % size) or size < 8:
        raise NotImplementedError(
            f"{NAME}: groups of {size} inputs, only 8, 16, 32, 64 and multiples of {_DEPTH}"
        )
    rows = x.shape[0] * PIECES[x.dtype.name]
    most = _FEWER_ROWS if size < _DEPTH else _ROWS[1]
    block = min(max(pl.next_power_of_2(rows), _ROWS[0]), most)
    row_blocks, steps = pl.cdiv(rows, block), pl.cdiv(inputs, _DEPTH)
    columns = _COLUMNS[block <= 32 and size >= _DEPTH]
    if splits is None:
        wanted = pl.cdiv(_PROGRAMS, row_blocks * pl.cdiv(outputs, columns))
        splits = max(1, min(wanted, steps // _LEAST_STEPS))
    return TritonShape(
        inputs, outputs, groups, bits, size, rows, block, columns, row_blocks, steps, splits
    )


def _arrange(shape: TritonShape, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x by places in words, and its sums over the groups of each step.

    The first is bfloat16 [places, padded, steps * words], the second float32 [padded, steps *
    parts], where padded is a multiple of the rows of a block.
    """
    padded = shape.row_blocks * shape.block
    x = pad(pieces_of(x), padded, axis=0)
    x = pad(x, shape.steps * _DEPTH, axis=1)
    groups = x.reshape(padded, shape.steps * shape.parts, -1)
    by_place = jnp.moveaxis(x.reshape(padded, -1, shape.places), 2, 0)
    return by_place, jnp.sum(groups, 2, dtype=jnp.float32)


def _kernel(
    shape: TritonShape,
    interpret: bool,
    x_ref: Ref,
    codes_ref: Ref,
    tables: list[Ref],
    y_ref: Ref,
) -> None:
    """Compute some columns of the product, over some of the inputs.

    x_ref: bfloat16 [places, padded, words], from `_arrange`.
    codes_ref: uint32 [words, outputs].
    tables: the scales; and with zeros, these, both [groups, outputs], and x's sums from `_arrange`.
    y_ref: [splits, rows, outputs].
    """
    row = pl.program_id(0) * shape.block + jnp.arange(shape.block)
    column = pl.program_id(1) * shape.columns + jnp.arange(shape.columns)
    split = pl.program_id(2)
    inside = column < shape.outputs
    all_words = shape.inputs // shape.places

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        """Add the product with 128 inputs to the total."""
        word = i * shape.words + jnp.arange(shape.words)
        there = (word < all_words)[:, None] & inside[None, :]
        words = plt.load(codes_ref.at[*_area(word, column)], mask=there, other=0)
        weights = [_unpacked(shape, words, j, interpret) for j in range(shape.places)]
        inputs = [plt.load(x_ref.at[j, *_area(row, word)]) for j in range(shape.places)]
        for part in range(shape.parts):
            group = i * shape.parts + part if shape.size <= _DEPTH else i * _DEPTH // shape.size
            real = inside & (group < shape.groups)
            scale = plt.load(tables[0].at[group, column], mask=real, other=0)
            mine = inputs
            if shape.parts > 1:
                of_part = jnp.arange(shape.words) // (shape.words // shape.parts) == part
                mine = [jnp.where(of_part[None, :], x, 0) for x in inputs]
            product = jnp.zeros_like(total)
            for x, weight in zip(mine, weights, strict=True):
                product += jnp.dot(x, weight, preferred_element_type=jnp.float32)
            if len(tables) > 1:
                zero = plt.load(tables[1].at[group, column], mask=real, other=0)
                sums = plt.load(tables[2].at[row, i * shape.parts + part])
                product -= sums[:, None] * (zero.astype(jnp.float32) - shape.half)[None, :]
            total += product * scale.astype(jnp.float32)[None, :]
        return total

    first, after = (k * shape.steps // shape.splits for k in (split, split + 1))
    total = jnp.zeros((shape.block, shape.columns), jnp.float32)
    total = lax.fori_loop(first, after, step, total)
    mask = (row < shape.rows)[:, None] & inside[None, :]
    plt.store(y_ref.at[split, *_area(row, column)], total.astype(y_ref.dtype), mask=mask)


def _area(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return indices, [rows, columns] each, of a block of an array's last two axes."""
    area = (row.size, column.size)
    return jnp.broadcast_to(row[:, None], area), jnp.broadcast_to(column[None, :], area)


def _unpacked(shape: TritonShape, words: jax.Array, j: int, interpret: bool) -> jax.Array:
    """Return code - shape.half for place j of words, in bfloat16 of the same shape."""
    if interpret:
        code = (words >> (j * shape.bits)) & (2**shape.bits - 1)
        return (code.astype(jnp.float32) - shape.half).astype(jnp.bfloat16)
    [unpacked] = plt.elementwise_inline_asm(
        four_bits(j) if shape.bits == 4 else eight_bits(j),
        args=[words],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return unpacked


def four_bits(j: int) -> str:
    """Return PTX that makes code - 8 of place j of two words, in two bfloat16 numbers.

    The code becomes the highest four of the seven bits of a mantissa, which make the number 16 +
    code. 24 is taken from it.
    """
    byte = j // 2
    shift = "shr.b32 x, x, 1;" if j % 2 else "shl.b32 x, x, 3;"
    return (
        f"{{ .reg .b32 x, y, z; prmt.b32 x, $1, $2, 0x{4 + byte}{4 + byte}{byte}{byte}; {shift}"
        "lop3.b32 x, x, 0x00780078, 0x41804180, 0xea;"
        "mov.b32 y, 0x3f803f80; mov.b32 z, 0xc1c0c1c0; fma.rn.bf16x2 $0, x, y, z; }"
    )


def eight_bits(j: int) -> str:
    """Return PTX that makes code - 128 of place j of two words, in two bfloat16 numbers.

    The code becomes the lowest byte of the float32 number 2^23, from which 2^23 + 128 is taken.
    """
    parts = [
        f"prmt.b32 x, ${i}, 0x4b000000, 0x754{j}; mov.b32 f, x; sub.rn.f32 {y}, f, 0f4b000080;"
        for i, y in ((1, "a"), (2, "b"))
    ]
    return f"{{ .reg .b32 x; .reg .f32 f, a, b; {' '.join(parts)} cvt.rn.bf16x2.f32 $0, b, a; }}"
