"""`Grouped`: a weight of 4- or 8-bit integers with a scale for each group of inputs, as GPTQ has.

The integers of an output lie packed in words along the inputs, in the order of a GPTQ file's
`qweight`, so a file's bytes are the leaf's. (GPTQ: arXiv 2210.17323.) Nothing here knows of layers
or files.
"""

import dataclasses
import functools
import logging
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int16, UInt8, UInt32

from qwen_jax.leaves import grouped_calls
from qwen_jax.leaves.weights import Leaf, Weight, product

WORD = 32  # the bits of a word
BITS = (4, 8)
OUTPUTS_LAST = Layout(major_to_minor=(0, 1))  # of words in memory, as kernels take them
_Array = TypeVar("_Array", jax.Array, np.ndarray)


@struct.dataclass
class Grouped(Leaf):
    """A weight whose element for input i and output o is (code[i, o] - zero[g, o]) * scale[g, o].

    g is the group of the input: all groups have the same number of inputs.

    codes: uint32 [in x bits / 32, out], the integers, of which a word holds those of successive
        inputs, the first in its lowest bits (`unpack`).
    scales: [groups, out], float16 as in the file; int16, their bits, for a kernel that takes no
        float16 (`for_kernel`).
    zeros: uint8 [groups, out], the integer that stands for 0; None where it is 2^(bits - 1)
        throughout (symmetric rounding).
    order: int32 [in], the input of each row of codes, where they are sorted by group (GPTQ's
        act-order); None where row i is input i.
    bits: 4 or 8.
    kernel: the kernel that multiplies by it, a name of `grouped_calls.KERNELS`. None makes floats
        of it for each product, and so does a product that the kernel declines.

    A decoder stacked for training has an axis L before the others.
    """

    codes: Weight
    scales: Weight
    zeros: Weight | None
    order: Weight | None
    bits: int = struct.field(pytree_node=False)
    kernel: str | None = struct.field(pytree_node=False, default=None)

    @property
    def letters(self) -> str:
        """The axis letters of the weight, outputs first, such as "FD"."""
        *layers, inputs, outputs = self.codes.letters
        return "".join((*layers, outputs, inputs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, outputs first."""
        *layers, words, outputs = self.codes.shape
        return (*layers, outputs, words * WORD // self.bits)

    @property
    def group_size(self) -> int:
        """The number of inputs in a group."""
        return self.shape[-1] // self.scales.shape[-2]

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """Return the weight as floats [in, out], computed in float32 and rounded to `dtype`.

        Its rows are in the order of the codes. The codes are those of one layer.
        """
        tables = [_frozen(x) for x in (self.scales, self.zeros) if x is not None]
        return floats(_frozen(self.codes), *tables, bits=self.bits, dtype=dtype)


def floats(
    words: UInt32[Array, "words out"],
    scales: Float[Array, "groups out"] | Int16[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None = None,
    *,
    bits: int,
    dtype: DTypeLike,
) -> Float[Array, "inputs out"]:
    """Return the floats that integers stand for, computed in float32 and rounded to `dtype`.

    words: packed codes. scales, zeros, bits: the fields of `Grouped`.
    """
    spec = jax.typeof(words).sharding.spec
    codes = _in_groups(unpack(words, bits), scales.shape[0])
    middle: Any = 2 ** (bits - 1)
    if zeros is not None:
        middle = zeros.astype(jnp.float32)[:, None, :]
    if scales.dtype == jnp.int16:
        scales = jax.lax.bitcast_convert_type(scales, jnp.float16)
    scaled = (codes.astype(jnp.float32) - middle) * scales.astype(jnp.float32)[:, None, :]
    shape = (words.shape[0] * WORD // bits, words.shape[1])
    return _reshaped(scaled.astype(dtype), shape, spec)


def _frozen(weight: Weight) -> jax.Array:
    """Return the array of a weight that is not trained, so that no gradient of it is summed."""
    array = weight[...]
    return jax.reshard(array, P(*jax.typeof(array).sharding.spec.partitions))


def unpack(words: _Array, bits: int) -> _Array:
    """Unpack the integers of words, uint32 [..., words, out], to uint8 [..., in, out]."""
    *outer, rows, outputs = words.shape
    per_word = WORD // bits
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)[:, None]
    fields = (words[..., :, None, :] >> shifts) & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(*outer, rows * per_word, outputs)


def pack(codes: _Array, bits: int) -> _Array:
    """Pack integers uint8 [..., in, out] into words, uint32 [..., in x bits / 32, out].

    The number of inputs must be a multiple of those in a word.
    """
    *outer, inputs, outputs = codes.shape
    per_word = WORD // bits
    fields = codes.reshape(*outer, inputs // per_word, per_word, outputs).astype(np.uint32)
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)[:, None]
    shifted: Any = fields << shifts
    return shifted.sum(axis=-2, dtype=np.uint32)


def _in_groups(codes: UInt8[Array, "inputs out"], groups: int) -> UInt8[Array, "groups size out"]:
    """Cut the rows of codes [in, out] into groups, of which each device keeps its own."""
    rows, outputs = codes.shape
    inputs, *rest = jax.typeof(codes).sharding.spec.partitions
    return _reshaped(codes, (groups, rows // groups, outputs), P(inputs, None, *rest))


def _reshaped(x: jax.Array, shape: tuple[int, ...], spec: P) -> jax.Array:
    """Reshape an array into this partitioning; within `shard_map`, where there is none, plainly."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.lax.reshape(x, shape, out_sharding=spec if explicit else None)


def group_for(inputs: int, *, group_size: int, parts: int, bits: int) -> int:
    """Return the largest group that cuts neither a group of `group_size` nor a part of the inputs.

    inputs: the number of inputs of the weight.
    parts: the number of devices among which the inputs are divided.

    Scales repeated for such groups give the same weight. Raises ValueError where a part would cut a
    word of codes.
    """
    per_word = WORD // bits
    if inputs % (parts * per_word):
        raise ValueError(
            f"{inputs} inputs of {bits} bits cannot be divided among {parts} devices, as a word "
            f"holds {per_word} of them"
        )
    return math.gcd(group_size, inputs // parts)


@product.register
def _(weight: Grouped, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    given, leaf, result = equation.replace("->", ",").split(",")
    if weight.order is not None:
        x = _sorted(x, _frozen(weight.order))
    if weight.kernel is not None:
        try:
            return grouped_calls.multiply(
                x,
                _frozen(weight.codes),
                scales=_frozen(weight.scales),
                zeros=None if weight.zeros is None else _frozen(weight.zeros),
                bits=weight.bits,
                kernel=weight.kernel,
                out=out,
                dtype=kwargs.get("preferred_element_type", x.dtype),
            )
        except NotImplementedError as declined:
            _say_once(f"{declined}: such products make floats of their weights")
    whole = Weight(weight.dequantize(x.dtype), letters=leaf[::-1])
    return product(whole, f"{given},{leaf[::-1]}->{result}", x, out, **kwargs)


@functools.cache
def _say_once(line: str) -> None:
    """Log a line to the logger "qwen_jax", once per process."""
    logging.getLogger("qwen_jax").info(line)


def _sorted(x: Float[Array, "B T inputs"], order: Any) -> Float[Array, "B T inputs"]:
    """Return an activation with its last axis in the order of the codes of a weight.

    Where that axis is divided over devices, each needs elements of all others: they are gathered.
    """
    spec = jax.typeof(x).sharding.spec
    *outer, inputs = spec.partitions
    taken = jnp.take(jax.reshard(x, P(*outer, None)), order, axis=-1)
    return jax.reshard(taken, P(*outer, inputs, reduced=spec.reduced))


def for_kernel(weight: Grouped, kernel: str) -> Grouped:
    """Return a weight by which a kernel multiplies, a name of `grouped_calls.KERNELS`.

    What a TPU's kernel does not take as it is, each pass would copy, of all layers: float16, so
    that scales are stored as its bits; and words that lie inputs last, as XLA lays them out by
    itself where that needs less padding (outputs on a device that are no multiple of 128). Stacked
    layers lose that layout (`model.stack`).
    """
    if kernel != "pallas_tpu":
        return dataclasses.replace(weight, kernel=kernel)
    codes, scales = weight.codes, weight.scales
    bits = jax.lax.bitcast_convert_type(scales[...], jnp.int16)
    return dataclasses.replace(
        weight,
        codes=Weight(with_layout_constraint(codes[...], OUTPUTS_LAST), letters=codes.letters),
        scales=Weight(bits, letters=scales.letters),
        kernel=kernel,
    )


@functools.partial(jax.jit, static_argnames="dtype")
def plain(weight: Grouped, dtype: DTypeLike) -> Weight:
    """Return a weight of one layer as floats, [out, in], in the order of its inputs."""
    floats = weight.dequantize(dtype)
    if weight.order is not None:
        inputs, outputs = jax.typeof(floats).sharding.spec.partitions
        whole = jax.reshard(floats, P(None, outputs))
        back = jnp.argsort(weight.order[...])
        floats = jax.reshard(jnp.take(whole, back, axis=0), P(inputs, outputs))
    return Weight(floats.T, letters=weight.letters)
