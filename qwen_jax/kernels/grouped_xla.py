"""Products with weights of 4- and 8-bit integers in groups, as XLA computes them.

Of a product written plainly (floats are made of the weight, then multiplied by), XLA writes these
floats to memory, on every platform. Here are forms of which it does not, or of a part at a time.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8, UInt32

_WORD = 32
_COLUMNS = 1024  # outputs of a weight that `of_rows` makes floats of at a time
# The arrays in bfloat16 whose sum is x, by x's dtype.
PIECES: Mapping[str, int] = {"bfloat16": 1, "float16": 2, "float32": 3}


def one_row(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B out"]:
    """Multiply one row by a weight with elements (code - zero) * scale, without a matrix product.

    x: [1, in].
    codes: uint32 [in * bits / 32, out]; a word holds successive inputs, the first in its lowest
        bits.
    scales: float16 or float32 [groups, out]; all groups have the same number of inputs.
    zeros: uint8 [groups, out]; None where all are 2^(bits - 1).
    bits: 4 or 8.
    dtype: of the result; None for x's.

    XLA for GPUs fuses all of it into two kernels: the sums over the words of each group, which are
    unpacked where they are read, and the sum over groups. The weight is not rounded.
    """
    if x.shape[0] != 1:
        raise NotImplementedError(f"one_row: {x.shape[0]} rows, only 1")
    (groups, outputs), places = scales.shape, _WORD // bits
    zero = jnp.broadcast_to(_zeros(zeros, bits), (groups, codes.shape[0] // groups, outputs))
    zero = zero.reshape(codes.shape)
    by_place = x[0].astype(jnp.float32).reshape(-1, places)
    # Not one sum over places and words, for which XLA writes all integers of 8 bits as floats.
    terms = [(_field(codes, j, bits) - zero) * by_place[:, j, None] for j in range(places)]
    sums = jnp.sum(functools.reduce(jnp.add, terms).reshape(groups, -1, outputs), 1)
    y = jnp.sum(sums * scales.astype(jnp.float32), 0, keepdims=True)
    return y.astype(dtype or x.dtype)


def by_groups(
    x: Float[Array, "B inputs"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B out"]:
    """Multiply rows by one group of inputs after the other; other arguments are those of `one_row`.

    It is for CPUs. Each place of the words of a group makes a product of its own, with every eighth
    input (every fourth, of eight bits), so that no integer is moved, and the floats of one place
    of one group stay in a core's cache. The weight is not rounded; products are in float32.
    """
    (groups, outputs), places = scales.shape, _WORD // bits
    by_place = x.astype(jnp.float32).reshape(x.shape[0], groups, -1, places)
    by_place = jnp.moveaxis(by_place, (1, 3), (0, 1))  # [groups, places, B, words of a group]

    def step(
        total: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        inputs, words, scale, zero = group
        products = [
            jnp.dot(inputs[j], _field(words, j, bits) - zero, precision=lax.Precision.HIGHEST)
            for j in range(places)
        ]
        return total + functools.reduce(jnp.add, products) * scale, None

    zero = _zeros(zeros, bits)[:, 0]
    parts = (
        by_place,
        codes.reshape(groups, -1, outputs),
        scales.astype(jnp.float32),
        jnp.broadcast_to(zero, (groups, zero.shape[1])),
    )
    total, _ = lax.scan(step, jnp.zeros((x.shape[0], outputs)), parts)
    return total.astype(dtype or x.dtype)


def of_rows(
    dy: Float[Array, "B out"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
) -> Float[Array, "B inputs"]:
    """Multiply rows by the transpose of a weight: the gradient of a product's rows.

    dy: [B, out]. The other arguments are those of `one_row`.

    Of a block of outputs, each place of the words makes floats and a product of its own, so that no
    integer is moved, and no more of the weight exists as floats. They are rounded to dy's dtype.
    """
    (groups, outputs), places = scales.shape, _WORD // bits
    size = next(n for n in range(min(_COLUMNS, outputs), 0, -1) if outputs % n == 0)

    def blocks(x: jax.Array) -> jax.Array:  # [rows, out] -> [blocks, rows, size]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0)

    def step(total: jax.Array, some: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        dy, words, scale, zero = some
        words = words.reshape(groups, -1, size)
        added = []
        for j in range(places):
            weight = (_field(words, j, bits) - zero[:, None]) * scale[:, None]
            weight = weight.reshape(-1, size).astype(dy.dtype)
            given = {"precision": _precision(dy), "preferred_element_type": jnp.float32}
            added.append(jnp.einsum("bo,wo->bw", dy, weight, **given))
        return total + jnp.stack(added), None

    zero = jnp.broadcast_to(_zeros(zeros, bits)[:, 0], (groups, outputs))
    total = jnp.zeros((places, dy.shape[0], codes.shape[0]), jnp.float32)
    given = (blocks(dy), blocks(codes), blocks(scales.astype(jnp.float32)), blocks(zero))
    total, _ = lax.scan(step, total, given)
    return jnp.moveaxis(total.astype(dy.dtype), 0, -1).reshape(dy.shape[0], -1)


def _precision(x: jax.Array) -> lax.Precision:
    """Return the precision of products of x: of all its bits."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def _field(codes: jax.Array, j: int, bits: int) -> jax.Array:
    """Return the integers in place j of words, in float32."""
    return ((codes >> np.uint32(j * bits)) & np.uint32(2**bits - 1)).astype(jnp.float32)


def _zeros(zeros: jax.Array | None, bits: int) -> jax.Array:
    """Return the zero points, float32 [groups, 1, out], or [1, 1, 1] where all are equal."""
    if zeros is None:
        return jnp.full((1, 1, 1), 2.0 ** (bits - 1))
    return zeros.astype(jnp.float32)[:, None]


def pieces_of(x: Float[Array, "B inputs"]) -> Float[Array, "pieces inputs"]:
    """Return the fewest arrays in bfloat16 whose sum is x, one behind the other."""
    number = PIECES[x.dtype.name]
    if number == 1:
        return x
    rest, pieces = x.astype(jnp.float32), []
    for _ in range(number):  # a conversion and back would be left out, as if it were exact
        piece = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        pieces.append(piece.astype(jnp.bfloat16))
        rest = rest - piece
    return jnp.concatenate(pieces)
