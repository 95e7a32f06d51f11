"""Products with weights of 4- and 8-bit integers in groups, for TPUs (Pallas, Mosaic).

With few rows a product takes as long as reading the weight does, so the integers go from HBM to
VMEM as they are, in the order of a GPTQ file, and become bfloat16 in registers, just before the
matrix unit takes them. Integers are exact there; the scale of a group multiplies the sum over the
group, in float32, so neither the weight nor its scale is ever rounded.

A register of words is one of int4 or int8 after an exclusive or, and where a chip converts those
quickly, that is all (four bits: v6e and later; eight: v5e, v5p and later). Elsewhere a word is cut
into four parts. Four bits are put into the mantissa of the bfloat16 number 16, as 16 + code, two
codes of a word at a time, and the sum of x over the group, times 16 and the zero point, is
subtracted from the group's sum. Eight bits are shifted and converted.

Groups of fewer than the 128 inputs that fill a matrix unit share its square of weights: each group
has rows of its own, which hold x where the group is, and zeros elsewhere.

With many rows a product takes as long as the matrix units are busy. A block of the weight becomes
bfloat16 in VMEM for all rows of a block, and is nowhere whole. Up to a v5p, scaling the products of
bfloat16 rows costs no time, as matrix units give them back group by group. From a v6e on they add
up 256 inputs and more by themselves, and scaled products would halve their speed: there, and for
groups of fewer than 128 inputs, the scale multiplies the weight, which is rounded to bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int16, UInt8, UInt32

from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import Ref, pad, round_up
from qwen_jax.kernels.grouped_xla import PIECES, pieces_of

NAME = "grouped_tpu"
# By device_kind: the bits of integers that a chip converts to bfloat16 quickly, and the bytes of
# VMEM that a kernel may use.
NATIVE = {"TPU v5 lite": (8,), "TPU v5": (8,), "TPU v6 lite": (4, 8), "TPU7x": (4, 8)}
# Chips whose matrix units add up the products of more than 128 inputs.
_ADDING = ("TPU v6 lite", "TPU7x")
_MIB = 2**20
_VMEM = {"TPU v4": 15 * _MIB, "TPU v5": 60 * _MIB, "TPU7x": 60 * _MIB}
_LARGE = 100 * _MIB  # of a v5e or a v6e
_WORD, _DEPTH, _SUBLANES = 32, 128, 8
_FEW = 64  # rows for which the weight is not dequantised for a block of rows
_ROWS = 512  # rows of the matrix product at most
_TILE = 256  # columns whose sums are in registers at once, and of a matrix unit of a v6e
# Weights in a grid step, the least and the most, and steps. A step fills and drains the matrix
# units, in the time of 600,000 weights on a v6e; nothing is computed before the first step's
# weights have come.
_WEIGHTS, _STEPS = (2**20, 2**22), 4
_TABLE_ROWS = 16  # groups whose scales are loaded at once: a register of float16


class Shape(NamedTuple):
    """The sizes by which the kernel divides its work.

    rows, inputs, outputs: the shape of the product.
    groups: the groups of the inputs.
    bits: 4 or 8.
    span: inputs of one matrix product, a multiple of 128: a group, or several.
    parts: groups in a span.
    pieces: arrays in bfloat16 whose sum is x.
    padded: the rows of all pieces, for one group, padded to whole registers.
    columns: outputs in a grid step.
    native: whether registers of integers are converted, and words not cut into parts.
    """

    rows: int
    inputs: int
    outputs: int
    groups: int
    bits: int
    span: int
    parts: int
    pieces: int
    padded: int
    columns: int
    native: bool

    @property
    def spans(self) -> int:
        """The number of matrix products for a column."""
        return -(-self.inputs // self.span)

    @property
    def words(self) -> int:
        """The number of words of a span."""
        return self.span * self.bits // _WORD

    @property
    def lowest(self) -> int:
        """The number that a code of 0 becomes."""
        return 16 if self.bits == 4 and not self.native else -(2 ** (self.bits - 1))


class Blocks(NamedTuple):
    """The sizes by which the kernel for many rows divides its work.

    inputs, groups, bits: as in `Shape`.
    size: inputs of a group.
    rows, columns, depth: rows, outputs and inputs in a grid step.
    rounded: whether scales multiply weights, which are rounded to bfloat16, and not products.
    native: as in `Shape`; a conversion takes no time beside the products of so many rows.
    """

    inputs: int
    groups: int
    bits: int
    size: int
    rows: int
    columns: int
    depth: int
    rounded: bool
    native: bool = True

    @property
    def held(self) -> int:
        """The number of rows of scales that all grid steps of a column take."""
        return -(-round_up(self.inputs, self.depth) // self.size)


def tpu_product(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"] | Int16[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
    dtype: DTypeLike | None = None,
    native: bool | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B out"]:
    """Multiply rows by a weight whose elements are (code - zero) * scale.

    x: [B, in].
    codes: uint32 [in * bits / 32, out]; a word holds successive inputs, the first in its lowest
        bits.
    scales: float16 or float32 [groups, out], finite, or int16, the bits of float16; all groups have
        the same number of inputs. Mosaic takes no float16, whose bits XLA copies for each call.
    zeros: uint8 [groups, out]; None where all are 2^(bits - 1).
    bits: 4 or 8.
    dtype: of the result; None for x's.
    native: whether the chip converts integers of so many bits quickly; None asks the device.
    interpret: whether to interpret the kernel; None does so on a CPU only.

    Sums are in float32. The weight is not rounded, but where the head of this file says so. Raises
    NotImplementedError for a shape, dtype or device that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "tpu") if interpret is None else interpret
    if x.dtype.name not in PIECES:
        raise NotImplementedError(f"{NAME}: dtype {x.dtype.name}, only {', '.join(PIECES)}")
    if bits not in (4, 8):
        raise NotImplementedError(f"{NAME}: {bits} bits, only 4 and 8")
    if scales.dtype == jnp.float16:
        scales = lax.bitcast_convert_type(scales, jnp.int16)
    tables = [scales] if zeros is None else [scales, zeros]
    if x.shape[0] > _FEW:
        return _many_rows(x, codes, tables, bits, dtype or x.dtype, interpret)
    kind = choice.device().device_kind
    native = bits in NATIVE.get(kind, ()) if native is None else native
    shape = shape_of(x, codes, scales, bits=bits, native=native)

    def of_step(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, shape.columns), lambda i: (0, i))

    arranged = _arrange(shape, x)
    return pl.pallas_call(
        functools.partial(_kernel, shape),
        out_shape=jax.ShapeDtypeStruct((shape.rows, shape.outputs), dtype or x.dtype),
        grid=(pl.cdiv(shape.outputs, shape.columns),),
        in_specs=[
            pl.BlockSpec(arranged.shape, lambda i: (0, 0, 0)),
            of_step(shape.spans * shape.words),
            [of_step(shape.groups)] * len(tables),
        ],
        out_specs=of_step(shape.rows),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM.get(kind, _LARGE)
        ),
        interpret=interpret,
        name=NAME,
    )(arranged, codes, tables)


def shape_of(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    scales: Float[Array, "groups out"] | Int16[Array, "groups out"],
    *,
    bits: int,
    native: bool,
) -> Shape:
    """Choose the sizes by which the kernel divides its work; the arguments are `tpu_product`'s.

    Raises NotImplementedError for a shape that the kernel does not support.
    """
    groups = scales.shape[0]
    (rows, inputs), outputs = x.shape, codes.shape[1]
    size = _group_size(inputs, groups)
    span = max(size, _DEPTH)
    parts, pieces = span // size, PIECES[x.dtype.name]
    padded = round_up(rows * pieces, _SUBLANES if parts > 1 else 2 * _SUBLANES)
    if parts * padded > _ROWS:
        raise NotImplementedError(
            f"{NAME}: {rows} rows of {x.dtype.name} for groups of {size} inputs are "
            f"{parts * padded} of bfloat16, only up to {_ROWS}"
        )
    least, most = (pl.cdiv(weights, inputs) for weights in _WEIGHTS)
    columns = min(most, max(least, pl.cdiv(outputs, _STEPS)))
    columns = min(round_up(columns, _TILE), round_up(outputs, _DEPTH))
    return Shape(rows, inputs, outputs, groups, bits, span, parts, pieces, padded, columns, native)


def _group_size(inputs: int, groups: int) -> int:
    """Return the inputs of a group, or raise NotImplementedError if there can be no such groups."""
    size = inputs // groups if groups > 1 else round_up(inputs, _DEPTH)
    if (size % _DEPTH and _DEPTH % size) or _DEPTH // size > _TABLE_ROWS:
        raise NotImplementedError(
            f"{NAME}: groups of {size} inputs, only 8, 16, 32, 64 and multiples of {_DEPTH}"
        )
    return size


def _arrange(shape: Shape, x: jax.Array) -> jax.Array:
    """Return x as the kernel takes it, bfloat16 [spans, parts * padded, span].

    The inputs of a span are in the order in which its codes are unpacked.
    """
    x = pad(pieces_of(x), shape.padded, axis=0)
    x = pad(x, shape.spans * shape.span, axis=1).reshape(shape.padded, -1, _DEPTH)
    order = np.arange(_DEPTH)
    if not shape.native:  # row i of part j of `_unpacked` is input 4 i + j
        order = order.reshape(-1, 4).T.reshape(-1)
        # A product with one 1 in each column is exact, and a transposition of so few numbers slow.
        x = _dot(x, jnp.asarray(np.eye(_DEPTH)[:, order], jnp.bfloat16)).astype(x.dtype)
    x = jnp.moveaxis(x.reshape(shape.padded, shape.spans, shape.span), 0, 1)[:, None]
    if shape.parts > 1:
        part = order // (_DEPTH // shape.parts)
        x = jnp.where(part == np.arange(shape.parts)[:, None, None], x, 0)
    return x.reshape(shape.spans, -1, shape.span)


def _kernel(shape: Shape, x: Ref, codes: Ref, tables: list[Ref], y: Ref) -> None:
    """Compute some columns of the product.

    x: bfloat16 [spans, parts * padded, span], from `_arrange`.
    codes: uint32 [spans * words, columns].
    tables: the scales, float32 or the bits of float16, [groups, columns], and the zeros, if any.
    y: [rows, columns].
    """
    for first in range(0, shape.columns, _TILE):
        columns = slice(first, min(first + _TILE, shape.columns))
        total = jnp.zeros((shape.padded, columns.stop - first), jnp.float32)
        for base in range(0, shape.groups, _TABLE_ROWS):
            groups = slice(base, min(base + _TABLE_ROWS, shape.groups))
            loaded = [table[groups, columns] for table in tables]
            total = _add_groups(shape, base, x, codes.at[:, columns], loaded, total)
        pieces = [total[i * shape.rows : (i + 1) * shape.rows] for i in range(shape.pieces)]
        y[:, columns] = functools.reduce(jnp.add, pieces[::-1]).astype(y.dtype)


def _add_groups(
    shape: Shape, base: int, x: Ref, codes: Ref, tables: list[jax.Array], total: jax.Array
) -> jax.Array:
    """Add the products of some groups to `total` [padded, tile], and return it.

    base: the first group, which begins a span.
    codes: uint32 [spans * words, tile].
    tables: the scales, and the zeros, if any, of these groups, [groups, tile].
    """
    scales = _float32(tables[0])
    zero = shape.lowest + 2.0 ** (shape.bits - 1)
    for row in range(scales.shape[0]):
        span, part = divmod(base + row, shape.parts)
        if part == 0:
            words = codes[span * shape.words : (span + 1) * shape.words]
            weights = _unpacked(shape, words)
            products = _dot(x[span], weights)
        rows = slice(part * shape.padded, (part + 1) * shape.padded)
        product = products[rows]
        if len(tables) == 2:
            zero = shape.lowest + tables[1][row : row + 1].astype(jnp.int32).astype(jnp.float32)
        if len(tables) == 2 or zero:
            product -= jnp.sum(x[span, rows].astype(jnp.float32), -1, keepdims=True) * zero
        total += product * scales[row : row + 1]
    return total


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply two matrices of bfloat16; the sums are float32."""
    return jnp.dot(x, y, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _unpacked(shape: Shape | Blocks, words: jax.Array) -> jax.Array:
    """Unpack words [words, tile] to code + shape.lowest, in bfloat16 [span, tile]."""
    if shape.native:
        half, integers = (0x88888888, jnp.int4) if shape.bits == 4 else (0x80808080, jnp.int8)
        return pltpu.bitcast(words ^ jnp.uint32(half), integers).astype(jnp.bfloat16)
    part = _mantissas if shape.bits == 4 else _bytes
    of_span = _DEPTH * shape.bits // _WORD
    blocks = [words[i : i + of_span] for i in range(0, words.shape[0], of_span)]
    return jnp.concatenate([part(block, j) for block in blocks for j in range(4)], 0)


def _mantissas(words: jax.Array, j: int) -> jax.Array:
    """Return 16 + code for the codes in bits 4 j to 4 j + 3 of both halves of each word.

    Returns bfloat16 [2 words, tile].
    """
    shift = 4 * j - 3  # to the highest four bits of a mantissa of seven
    moved = words >> shift if shift > 0 else words << -shift
    return pltpu.bitcast((moved & jnp.uint32(0x00780078)) | jnp.uint32(0x41804180), jnp.bfloat16)


def _bytes(words: jax.Array, j: int) -> jax.Array:
    """Return code - 128 for byte j of each word, in bfloat16 [words, tile]."""
    signed = lax.bitcast_convert_type(words ^ jnp.uint32(0x80808080), jnp.int32)
    return ((signed << (24 - 8 * j)) >> 24).astype(jnp.float32).astype(jnp.bfloat16)


def _float32(scales: jax.Array) -> jax.Array:
    """Convert scales from float32, or from the bits of finite float16 numbers in int16."""
    if scales.dtype != jnp.int16:
        return scales.astype(jnp.int32).astype(jnp.float32) if scales.dtype == jnp.uint8 else scales
    bits = scales.astype(jnp.int32)
    size = bits & 0x7FFF
    normal = lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    value = jnp.where(size < 1 << 10, size.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -value, value)


def _many_rows(
    x: jax.Array,
    codes: jax.Array,
    tables: list[jax.Array],
    bits: int,
    dtype: DTypeLike,
    interpret: bool,
) -> jax.Array:
    """Multiply many rows; the arguments are `tpu_product`'s, and `tables` scales and zeros."""
    kind = choice.device().device_kind
    if kind == "TPU v4":
        raise NotImplementedError(f"{NAME}: more than {_FEW} rows on a {kind}")
    pieces = PIECES[x.dtype.name]
    rows = pieces_of(x)
    shape = blocks_of(x, codes, tables[0], bits=bits, kind=kind)

    def of_columns(rows: int, *, whole: bool) -> pl.BlockSpec:
        return pl.BlockSpec((rows, shape.columns), lambda _, c, k: (0 if whole else k, c))

    scratch = pltpu.VMEM((shape.held, shape.columns), jnp.float32)
    y = pl.pallas_call(
        functools.partial(_many_kernel, shape),
        out_shape=jax.ShapeDtypeStruct(
            (rows.shape[0], codes.shape[1]), dtype if pieces == 1 else jnp.float32
        ),
        grid=(
            pl.cdiv(rows.shape[0], shape.rows),
            pl.cdiv(codes.shape[1], shape.columns),
            pl.cdiv(shape.inputs, shape.depth),
        ),
        in_specs=[
            pl.BlockSpec((shape.rows, shape.depth), lambda r, _, k: (r, k)),
            of_columns(shape.depth * bits // _WORD, whole=False),
            [of_columns(shape.groups, whole=True)] * len(tables),
        ],
        out_specs=pl.BlockSpec((shape.rows, shape.columns), lambda r, c, _: (r, c)),
        scratch_shapes=[
            pltpu.VMEM((shape.rows, shape.columns), jnp.float32),
            [scratch] * len(tables),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM.get(kind, _LARGE),
        ),
        interpret=interpret,
        name=f"{NAME}_many",
    )(rows, codes, tables)
    if pieces == 1:
        return y
    return jnp.sum(y.reshape(pieces, *x.shape[:1], -1)[::-1], 0).astype(dtype)


def blocks_of(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    scales: Float[Array, "groups out"] | Int16[Array, "groups out"],
    *,
    bits: int,
    kind: str,
) -> Blocks:
    """Choose the sizes by which the kernel for many rows divides its work.

    kind: the chip's `device_kind`; the other arguments are `tpu_product`'s.

    Raises NotImplementedError for a shape that the kernel does not support.
    """
    inputs, outputs, groups = x.shape[1], codes.shape[1], scales.shape[0]
    pieces = PIECES[x.dtype.name]
    size = _group_size(inputs, groups)
    large = kind in _ADDING
    rounded = pieces == 1 and (large or size < _DEPTH)
    if size < _DEPTH and not rounded:
        raise NotImplementedError(
            f"{NAME}: more than {_FEW} rows for groups of {size} inputs, only of bfloat16"
        )
    most = 1024 if large else 512
    spans = -(-inputs // _DEPTH)
    depth = min(range(8, 13), key=lambda number: (round_up(spans, number), -number))
    return Blocks(
        inputs,
        groups,
        bits,
        size,
        min(most, round_up(x.shape[0] * pieces, 2 * _SUBLANES)),
        min(most, round_up(outputs, _DEPTH)),
        min(depth, spans) * _DEPTH,
        rounded,
    )


def _many_kernel(
    shape: Blocks,
    x: Ref,
    codes: Ref,
    tables: list[Ref],
    y: Ref,
    total: Ref,
    held: list[Ref],
) -> None:
    """Add the products with a block of inputs to a block of results.

    x: bfloat16 [rows, depth].
    codes: uint32 [words, columns].
    tables: the scales, and the zeros, if any, [groups, columns].
    y: [rows, columns].
    total: float32 [rows, columns], the sum over the blocks so far.
    held: the tables in float32, with 0 beyond the last group.
    """
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        for table, wide in zip(tables, held, strict=True):
            wide[...] = jnp.zeros_like(wide)
            wide[: shape.groups] = _float32(table[...])

    inputs = x[...]
    if shape.inputs % shape.depth:  # beyond the last input there may be NaN
        left = shape.inputs - step * shape.depth
        inputs = jnp.where(lax.broadcasted_iota(jnp.int32, inputs.shape, 1) < left, inputs, 0)
    words = _DEPTH * shape.bits // _WORD
    blocks = []
    for i in range(shape.depth // _DEPTH):
        first = step * shape.depth + i * _DEPTH
        block = _unpacked(shape, codes[i * words : (i + 1) * words])
        scales = _of_inputs(shape, held[0], first)
        if len(held) == 2:  # a difference of codes is exact in bfloat16
            zeros = _of_inputs(shape, held[1], first)
            block = block.astype(jnp.float32) + 2.0 ** (shape.bits - 1) - zeros
        if shape.rounded:
            blocks.append((block.astype(jnp.float32) * scales).astype(jnp.bfloat16))
        else:
            some = inputs[:, i * _DEPTH : (i + 1) * _DEPTH]
            total[...] += _dot(some, block.astype(jnp.bfloat16)) * scales
    if shape.rounded:
        total[...] += _dot(inputs, jnp.concatenate(blocks, 0))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y[...] = total[...].astype(y.dtype)


def _of_inputs(shape: Blocks, table: Ref, first: jax.Array) -> jax.Array:
    """Return the rows of a table for 128 inputs: one for all, or one for each."""
    if shape.size >= _DEPTH:
        return table[pl.ds(first // shape.size, 1)]
    parts = _DEPTH // shape.size
    rows = [table[pl.ds(first // shape.size + i, 1)] for i in range(parts)]
    return jnp.concatenate([jnp.broadcast_to(x, (shape.size, x.shape[1])) for x in rows], 0)
