"""RMS norm, and elementwise operations with a vector of weights."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax.leaves.weights import Weight
from qwen_jax.meshes import gathering


def rms_norm(x: Float[Array, "... D"], weight: Weight, *, eps: float) -> Float[Array, "... D"]:
    """Divide x by its root mean square, round to x's dtype, then multiply by the weight."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return in_float32(jnp.multiply, wide.astype(x.dtype), weight=weight)


def in_float32(
    operation: Callable[..., jax.Array], x: Float[Array, "... D"], *, weight: Weight
) -> Float[Array, "... D"]:
    """Compute x * weight or x + weight, and sum the weight's gradient over tokens, in float32."""
    wide = operation(x.astype(jnp.float32), weight[...].astype(jnp.float32))
    return wide.astype(x.dtype)


@functools.partial(jax.jit, static_argnames="eps")
def final_norm(x: Float[Array, "B T D"], weight: Weight, *, eps: float) -> Float[Array, "B T D"]:
    """Compute the RMS norm after the last block, whose weight is not gathered yet."""
    return rms_norm(x, gathering.unshard(weight, x.dtype), eps=eps)
