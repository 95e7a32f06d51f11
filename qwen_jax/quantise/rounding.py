"""The loops of GPTQ over the inputs of a matrix: its first rounding, and the choice of codes again.

Groups lie side by side here. The loops go by blocks of inputs, as the paper does: inside a block,
an input's error changes only the block, and each block's errors change the rest in one product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from qwen_jax.quantise import grid
from qwen_jax.quantise.grid import Grid

_BLOCK = 128  # the most inputs of a block
_HIGHEST = jax.lax.Precision.HIGHEST


def floats(codes: UInt8[Array, "G size O"], grids: Grid) -> Float[Array, "I O"]:
    """Return the weights that the codes of groups stand for."""
    values = jax.vmap(Grid.floats)(grids, codes.astype(jnp.float32))
    return values.reshape(-1, codes.shape[-1])


def first(
    weight: Float[Array, "I O"],
    factor: Float[Array, "I I"],
    *,
    size: int,
    bits: int,
    symmetric: bool,
) -> tuple[UInt8[Array, "G size O"], Grid]:
    """Round a matrix whose groups lie side by side, and return its codes and its groups' grids.

    factor: the upper Cholesky factor of the Hessian's inverse.
    size: the number of inputs in a group.
    symmetric: whether 2^(bits - 1) stands for 0; otherwise each group has its own zero.

    A group's grid is chosen when all inputs before the group are rounded.
    """
    (inputs, outputs), block = weight.shape, _block_of(size)
    cost = 1 / jnp.square(jnp.diagonal(factor))

    def of_group(
        weight: Float[Array, "I O"], start: Int32[Array, ""]
    ) -> tuple[Float[Array, "I O"], tuple[UInt8[Array, "blocks block O"], Grid]]:
        own = jax.lax.dynamic_slice_in_dim(weight, start, size)
        costs = jax.lax.dynamic_slice_in_dim(cost, start, size)
        chosen = grid.choose(own, costs, bits=bits, symmetric=symmetric)

        def of_block(
            weight: Float[Array, "I O"], start: Int32[Array, ""]
        ) -> tuple[Float[Array, "I O"], UInt8[Array, "block O"]]:
            rows = jax.lax.dynamic_slice_in_dim(factor, start, block)
            own = jax.lax.dynamic_slice_in_dim(weight, start, block)
            square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
            codes, errors = _rounded_block(own, square, chosen=chosen)
            # This also changes rows that are rounded already. Nothing reads them again.
            return weight - jnp.matmul(rows.T, errors, precision=_HIGHEST), codes

        starts = start + jnp.arange(0, size, block)
        weight, codes = jax.lax.scan(of_block, weight, starts)
        return weight, (codes, chosen)

    _, (codes, grids) = jax.lax.scan(of_group, weight, jnp.arange(0, inputs, size))
    return codes.reshape(-1, size, outputs), grids


def _rounded_block(
    weight: Float[Array, "b O"], factor: Float[Array, "b b"], *, chosen: Grid
) -> tuple[UInt8[Array, "b O"], Float[Array, "b O"]]:
    """Round the inputs of a block, and return their codes and errors.

    factor: the part of the triangular factor for the block.

    An input's error is divided by its diagonal element of the factor, by whose rows it is spread.
    """

    def of_input(
        weight: Float[Array, "b O"], number: Int32[Array, ""]
    ) -> tuple[Float[Array, "b O"], tuple[UInt8[Array, " O"], Float[Array, " O"]]]:
        row, own = factor[number], weight[number]
        code = chosen.nearest(own)
        error = (own - chosen.floats(code)) / row[number]
        return weight - row[:, None] * error, (code.astype(jnp.uint8), error)

    return jax.lax.scan(of_input, weight, jnp.arange(weight.shape[0]))[1]


def again(
    weight: Float[Array, "I O"],
    codes: UInt8[Array, "G size O"],
    *,
    grids: Grid,
    hessian: Float[Array, "I I"],
) -> UInt8[Array, "G size O"]:
    """Choose each code again, one input after the other, as is best given all others.

    hessian: with the damping that its factor had.

    The error never grows. Codes of earlier inputs make up for errors of later ones, which the first
    rounding could not know.
    """
    groups, size, outputs = codes.shape
    block = _block_of(size)

    def of_group(
        slopes: Float[Array, "I O"], own: tuple[UInt8[Array, "size O"], Grid, Int32[Array, ""]]
    ) -> tuple[Float[Array, "I O"], UInt8[Array, "blocks block O"]]:
        codes, chosen, start = own

        def of_block(
            slopes: Float[Array, "I O"], own: tuple[UInt8[Array, "block O"], Int32[Array, ""]]
        ) -> tuple[Float[Array, "I O"], UInt8[Array, "block O"]]:
            codes, start = own
            rows = jax.lax.dynamic_slice_in_dim(hessian, start, block)
            square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
            part = jax.lax.dynamic_slice_in_dim(slopes, start, block)
            codes, moves = _moved_block(codes, part, hessian=square, chosen=chosen)
            return slopes - jnp.matmul(rows.T, moves, precision=_HIGHEST), codes

        starts = start + jnp.arange(0, size, block)
        return jax.lax.scan(of_block, slopes, (codes.reshape(-1, block, outputs), starts))

    slopes = jnp.matmul(hessian, weight - floats(codes, grids), precision=_HIGHEST)
    starts = jnp.arange(0, groups * size, size)
    return jax.lax.scan(of_group, slopes, (codes, grids, starts))[1].reshape(codes.shape)


def _moved_block(
    codes: UInt8[Array, "b O"],
    slopes: Float[Array, "b O"],
    *,
    hessian: Float[Array, "b b"],
    chosen: Grid,
) -> tuple[UInt8[Array, "b O"], Float[Array, "b O"]]:
    """Choose the codes of a block's inputs again. Returns them, and by how much weights moved.

    slopes: half of what the mean squared error falls by, for each unit that a weight is raised by.
    hessian: the part of the Hessian for the block.
    """

    def of_input(
        slopes: Float[Array, "b O"], own: tuple[UInt8[Array, " O"], Int32[Array, ""]]
    ) -> tuple[Float[Array, "b O"], tuple[UInt8[Array, " O"], Float[Array, " O"]]]:
        code, number = own
        row, now = hessian[number], chosen.floats(code.astype(jnp.float32))
        code = chosen.nearest(now + slopes[number] / row[number])
        move = chosen.floats(code) - now
        return slopes - row[:, None] * move, (code.astype(jnp.uint8), move)

    return jax.lax.scan(of_input, slopes, (codes, jnp.arange(codes.shape[0])))[1]


def _block_of(size: int) -> int:
    """Return the number of inputs in a block, which divides the number of those in a group."""
    return max(n for n in range(1, min(size, _BLOCK) + 1) if size % n == 0)
