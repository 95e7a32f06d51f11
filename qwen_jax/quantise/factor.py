"""Factorises the Hessian of a matrix, with as much damping as that takes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_RISES = 24  # the damping is doubled so often before a Hessian is given up
_BLOCK = 128  # the most columns of a block
_HIGHEST = jax.lax.Precision.HIGHEST
_State = tuple[jax.Array, jax.Array, jax.Array]


def factorised(
    hessian: Float[Array, "I I"], damping: float
) -> tuple[Float[Array, "I I"], Float[Array, "I I"], Float[Array, ""]]:
    """Return a Hessian H with damping, an upper triangular R with R R^T = H, and the damping.

    damping: the least damping, as a part of the mean of the diagonal. The one that it took is NaN
        where none helped.

    With P, which reverses the inputs, and the lower Cholesky factor L of P H P, R is P L P.
    """
    inputs = hessian.shape[0]
    identity = jnp.eye(inputs, dtype=jnp.float32)
    dead = jnp.diagonal(hessian) <= 0  # such inputs must not make the matrix singular
    hessian = hessian + jnp.where(dead, identity, 0)
    mean = jnp.trace(hessian) / inputs

    def attempt(damping: Float[Array, ""]) -> Float[Array, "I I"]:
        reversed_ = (hessian + damping * mean * identity)[::-1, ::-1]
        # XLA's factorisation for TPUs takes minutes to compile, as it grows with the matrix.
        lower = jax.lax.platform_dependent(reversed_, tpu=cholesky, default=jnp.linalg.cholesky)
        return lower[::-1, ::-1]

    def failed(state: _State) -> Bool[Array, ""]:
        root, _, rises = state
        return ~jnp.all(jnp.isfinite(root)) & (rises < _RISES)

    def rise(state: _State) -> _State:
        _, damping, rises = state
        return attempt(2 * damping), 2 * damping, rises + 1

    first = jnp.asarray(damping, jnp.float32)
    state = attempt(first), first, jnp.zeros((), jnp.int32)
    root, last, _ = jax.lax.while_loop(failed, rise, state)
    known = jnp.where(jnp.all(jnp.isfinite(root)), last, jnp.nan)
    return hessian + last * mean * identity, root, known


def cholesky(matrix: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Compute the lower Cholesky factor of a matrix, block of columns by block of columns.

    It is NaN, in parts, where the matrix is not positive definite.
    """
    inputs = matrix.shape[0]
    block = block_of(inputs)
    rows = jnp.arange(inputs)

    def of_block(number: Int32[Array, ""], matrix: Float[Array, "I I"]) -> Float[Array, "I I"]:
        start = number * block
        panel = jax.lax.dynamic_slice_in_dim(matrix, start, block, axis=1)
        top = jnp.linalg.cholesky(jax.lax.dynamic_slice_in_dim(panel, start, block))
        inverse = jax.scipy.linalg.solve_triangular(top, jnp.eye(block), lower=True)
        panel = jnp.matmul(panel, inverse.T, precision=_HIGHEST)
        panel = jnp.where((rows >= start + block)[:, None], panel, 0)
        matrix = matrix - jnp.matmul(panel, panel.T, precision=_HIGHEST)
        panel = jax.lax.dynamic_update_slice_in_dim(panel, top, start, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(matrix, panel, start, axis=1)

    return jax.lax.fori_loop(0, inputs // block, of_block, matrix)


def block_of(size: int) -> int:
    """Return the number of inputs of a block, the largest divisor of `size` that is not too large.

    size: the number of inputs that blocks divide.
    """
    return max(n for n in range(1, min(size, _BLOCK) + 1) if size % n == 0)
