"""Weights of eight bits: a kind of leaf, whole numbers with a scale for each row.

Half of bfloat16's memory, for weights that are not trained themselves. The rounding is to the
nearest, row by row; nothing is calibrated. Knows no layer and no files.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from qwen_jax.leaves.weights import Leaf, Weight, product, scaled_product

_LARGEST = 127


@struct.dataclass
class Int8(Leaf):
    """A matrix as values int8 [..., out, in] times scale bfloat16 [..., out]."""

    values: Weight
    scale: Weight

    @property
    def letters(self) -> str:
        return self.values.letters

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@functools.partial(jax.jit, donate_argnums=0)
def quantized(weight: Weight) -> Int8:
    """The nearest leaf of eight bits; the weight passed in is consumed."""
    whole = weight[...].astype(jnp.float32)
    scale = (jnp.max(jnp.abs(whole), axis=-1) / _LARGEST).astype(jnp.bfloat16)
    unit = scale.astype(jnp.float32)[..., None]
    values = jnp.round(jnp.where(unit > 0, whole / unit, 0))
    values = jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8)
    return Int8(Weight(values, letters=weight.letters), Weight(scale, letters=weight.letters[:-1]))


def of_layers(path: str, weight: Weight) -> Any:
    """What `checkpoint.load` keeps of each leaf: matrices of layers in eight bits, as embedding,
    head, norms and biases are few and matter more.
    """
    small = not path.startswith("layers.") or len(weight.letters.removeprefix("L")) < 2
    return weight if small else quantized(weight)


@product.register
def _(weight: Int8, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    # Numbers up to 127 are exact in every float; rows of the result are scaled, not the weights.
    values = Weight(weight.values[...].astype(x.dtype), letters=weight.letters)
    return scaled_product(values, weight.scale[...], equation, x, out, **kwargs)
