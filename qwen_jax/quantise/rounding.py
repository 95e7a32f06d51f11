"""The loops of GPTQ over the inputs of a matrix: its first rounding, and the choice of codes again.

Groups lie side by side here. The loops go by blocks of inputs, as the paper does: inside a block,
an input's error changes only the block, and each block's errors change the rest in one product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from qwen_jax.quantise import grid
from qwen_jax.quantise.factor import block_of
from qwen_jax.quantise.grid import Grid

_HIGHEST = jax.lax.Precision.HIGHEST


def floats(codes: UInt8[Array, "G size O"], grids: Grid) -> Float[Array, "I O"]:
    """Return the weights that the codes of groups stand for."""
    values = jax.vmap(Grid.floats)(grids, codes.astype(jnp.float32))
    return values.reshape(-1, codes.shape[-1])


def first(
    weight: Float[Array, "I O"],
    root: Float[Array, "I I"],
    *,
    size: int,
    bits: int,
    symmetric: bool,
) -> tuple[UInt8[Array, "G size O"], Grid]:
    """Round a matrix whose groups lie side by side, and return its codes and its groups' grids.

    root: the upper triangular R of the Hessian R R^T.
    size: the number of inputs in a group.
    symmetric: whether 2^(bits - 1) stands for 0; otherwise each group has its own zero.

    The mean squared error of an output is |R^T e|^2, where e are the errors of its weights, and
    element i of R^T e has the errors of inputs up to i alone. So input i can make up for `owed[i]`,
    what earlier inputs contribute to it. That is GPTQ's update of weights that are still to come,
    without the inverse of the Hessian. A group's grid is chosen when the inputs before it are
    rounded.
    """
    (inputs, outputs), block = weight.shape, block_of(size)
    diagonal = jnp.diagonal(root)

    def of_group(
        owed: Float[Array, "I O"], start: Int32[Array, ""]
    ) -> tuple[Float[Array, "I O"], tuple[UInt8[Array, "blocks block O"], Grid]]:
        own = jax.lax.dynamic_slice_in_dim(weight, start, size)
        if size < inputs:  # to a group of all inputs, none owes anything
            square = jax.lax.dynamic_slice(root, (start, start), (size, size))
            given = jax.lax.dynamic_slice_in_dim(owed, start, size)
            own = own + jax.scipy.linalg.solve_triangular(square, given, trans="T")
        costs = jnp.square(jax.lax.dynamic_slice_in_dim(diagonal, start, size))
        chosen = grid.choose(own, costs, bits=bits, symmetric=symmetric)

        def of_block(
            owed: Float[Array, "I O"], start: Int32[Array, ""]
        ) -> tuple[Float[Array, "I O"], UInt8[Array, "block O"]]:
            rows = jax.lax.dynamic_slice_in_dim(root, start, block)
            own = jax.lax.dynamic_slice_in_dim(weight, start, block)
            given = jax.lax.dynamic_slice_in_dim(owed, start, block)
            square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
            codes, errors = _rounded_block(own, given, root=square, chosen=chosen)
            # This also changes rows of the block, which nothing reads again.
            return owed + jnp.matmul(rows.T, errors, precision=_HIGHEST), codes

        owed, codes = jax.lax.scan(of_block, owed, start + jnp.arange(0, size, block))
        return owed, (codes, chosen)

    starts = jnp.arange(0, inputs, size)
    _, (codes, grids) = jax.lax.scan(of_group, jnp.zeros_like(weight), starts)
    return codes.reshape(-1, size, outputs), grids


def _rounded_block(
    weight: Float[Array, "b O"],
    owed: Float[Array, "b O"],
    *,
    root: Float[Array, "b b"],
    chosen: Grid,
) -> tuple[UInt8[Array, "b O"], Float[Array, "b O"]]:
    """Round the inputs of a block, and return their codes and errors.

    owed: what inputs before the block contribute to R^T e. root: the part of R for the block.
    """

    def of_input(
        owed: Float[Array, "b O"], number: Int32[Array, ""]
    ) -> tuple[Float[Array, "b O"], tuple[UInt8[Array, " O"], Float[Array, " O"]]]:
        row, own = root[number], weight[number]
        code = chosen.nearest(own + owed[number] / row[number])
        error = own - chosen.floats(code)
        return owed + row[:, None] * error, (code.astype(jnp.uint8), error)

    return jax.lax.scan(of_input, owed, jnp.arange(weight.shape[0]))[1]


def again(
    weight: Float[Array, "I O"],
    codes: UInt8[Array, "G size O"],
    *,
    grids: Grid,
    hessian: Float[Array, "I I"],
) -> UInt8[Array, "G size O"]:
    """Choose each code again, one input after the other, as is best given all others.

    hessian: with its damping.

    The error never grows. Codes of earlier inputs make up for errors of later ones, which the first
    rounding could not know.
    """
    groups, size, outputs = codes.shape
    block = block_of(size)

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
