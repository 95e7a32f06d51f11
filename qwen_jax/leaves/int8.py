"""`Int8`: an array of 8-bit integers with a scale for each vector along its last axis.

It serves frozen weights, which take half of bfloat16's memory, and keys and values in the KV cache.
Rounding is to the nearest, one vector along the last axis at a time, without calibration. Nothing
here knows of layers or files.
"""

import functools
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen_jax.leaves.weights import Leaf, Weight, product, scaled_product

_LARGEST = 127
_Held = TypeVar("_Held", jax.Array, Weight)


@struct.dataclass
class Int8(Leaf, Generic[_Held]):
    """An array stored as values * scale + zero, with a scale (and zero) for each vector along H.

    values: int8 [..., H].
    scale: [...], float32 in the KV cache, bfloat16 for weights.
    zero: float32 [...], or None for symmetric rounding.

    In a decoder, values and scale are `Weight`s, which name their axes; in the KV cache they are
    arrays. scale and zero keep no axis of length 1 for H, which a TPU would pad to 128 lanes.
    """

    values: _Held
    scale: _Held
    zero: Float[Array, "..."] | None = None

    @property
    def letters(self: "Int8[Weight]") -> str:
        """The axis letters of a weight, such as "FD". An array in the KV cache has none."""
        return self.values.letters

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array, that of its values."""
        return self.values.shape

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """Return the array as floats, computed in float32 and rounded to `dtype`."""
        x = self.values[...].astype(jnp.float32) * self.scale[...].astype(jnp.float32)[..., None]
        return (x if self.zero is None else x + self.zero[..., None]).astype(dtype)


def quantize(
    x: Float[Array, "... H"], symmetric: bool = True, *, scale_dtype: DTypeLike = jnp.float32
) -> Int8[jax.Array]:
    """Round x [..., H] to 8-bit integers, with a scale for each vector along H.

    symmetric: whether the largest magnitude of a vector is scaled to 127, without a zero. Otherwise
        the range of its values is mapped to -128..127, with a zero.
    scale_dtype: the dtype of symmetric scales; others are float32.
    """
    x = x.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    if symmetric:
        scale = jnp.maximum(jnp.max(jnp.abs(x), -1) / _LARGEST, tiny).astype(scale_dtype)
        values = jnp.round(x / scale.astype(jnp.float32)[..., None])
        return Int8(jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), scale)
    low = jnp.min(x, -1, keepdims=True)
    scale = jnp.maximum((jnp.max(x, -1, keepdims=True) - low) / 255, tiny)
    values = jnp.clip(jnp.round((x - low) / scale) - 128, -128, 127)
    return Int8(values.astype(jnp.int8), scale[..., 0], (low + 128 * scale)[..., 0])


@functools.partial(jax.jit, donate_argnums=0)
def quantize_weight(weight: Weight) -> Int8[Weight]:
    """Round a weight to int8 with bfloat16 scales. The weight passed in is donated."""
    rounded = quantize(weight[...], scale_dtype=jnp.bfloat16)
    return Int8(
        Weight(rounded.values, letters=weight.letters),
        Weight(rounded.scale, letters=weight.letters[:-1]),
    )


@functools.partial(jax.jit, static_argnames="dtype")
def plain(weight: Int8[Weight], dtype: DTypeLike) -> Weight:
    """Return a weight as floats."""
    return Weight(weight.dequantize(dtype), letters=weight.letters)


def of_layers(path: str, weight: Weight | Leaf) -> Weight | Leaf:
    """Convert a weight to int8 if it is a matrix of a layer, and return any other one unchanged.

    Embedding, head, norms and biases keep their dtype, as they are few and matter more; so does a
    weight that is quantised already. It is a converter of weights for `checkpoint.load`.

    path: the weight's path in the decoder, such as `layers.0.attn.q`.
    """
    if isinstance(weight, Leaf) or not path.startswith("layers."):
        return weight
    matrix = len(weight.letters.removeprefix("L")) == 2
    return quantize_weight(weight) if matrix else weight


@product.register(Int8)
def _(weight: Int8[Weight], equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    # Integers up to 127 are exact in every float dtype. The rows of the result are scaled, not the
    # weights.
    values = Weight(weight.values[...].astype(x.dtype), letters=weight.letters)
    return scaled_product(values, weight.scale[...], equation=equation, x=x, out=out, **kwargs)
