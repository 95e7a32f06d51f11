"""Calls of the kernels that multiply by weights in groups, on any mesh, with their gradient.

Each device multiplies its own rows by its own part of the weight; where the inputs are divided, the
partial products are summed. The gradient of the rows never holds the weight as floats, either: a
block of its outputs at a time is dequantised. Weights in groups are never trained.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int16, UInt8, UInt32

from qwen_jax.kernels.grouped_hopper import hopper_product, shape_of
from qwen_jax.kernels.grouped_tpu import tpu_product
from qwen_jax.kernels.grouped_triton import triton_product
from qwen_jax.kernels.grouped_xla import by_groups, of_rows, one_row
from qwen_jax.meshes import sharding


class Product(Protocol):
    """A kernel that multiplies rows [B, in] by a weight in groups. Returns [B, out]."""

    def __call__(
        self,
        x: Float[Array, "B inputs"],
        codes: UInt32[Array, "words out"],
        *,
        scales: Float[Array, "groups out"] | Int16[Array, "groups out"],
        zeros: UInt8[Array, "groups out"] | None,
        bits: int,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "B out"]:
        """Multiply rows by a weight. dtype: of the result; None for that of x."""
        ...


def _on_gpus(x: jax.Array, codes: jax.Array, **given: Any) -> jax.Array:
    """Multiply rows on a GPU, where XLA's own sums are as good for one row."""
    return (one_row if x.shape[0] == 1 else triton_product)(x, codes, **given)


def _on_hoppers(x: jax.Array, codes: jax.Array, **given: Any) -> jax.Array:
    """Multiply rows on a Hopper GPU; by Triton where the Hopper kernel declines the shape."""
    try:
        shape_of(x, codes, given["scales"], bits=given["bits"])
    except NotImplementedError:
        return _on_gpus(x, codes, **given)
    return (one_row if x.shape[0] == 1 else hopper_product)(x, codes, **given)


KERNELS: dict[str, Product] = {
    "pallas_tpu": tpu_product,
    "pallas_hopper": _on_hoppers,
    "pallas_triton": _on_gpus,
    "by_groups": by_groups,  # for CPUs
}


def multiply(
    x: Float[Array, "B T inputs"],
    codes: UInt32[Array, "words out"],
    *,
    scales: Float[Array, "groups out"] | Int16[Array, "groups out"],
    zeros: UInt8[Array, "groups out"] | None,
    bits: int,
    kernel: str,
    out: P | None,
    dtype: DTypeLike,
) -> Float[Array, "B T out"]:
    """Multiply an activation by a weight in groups with a kernel. Returns [B, T, out].

    codes, scales, zeros, bits: the fields of `Grouped`.
    kernel: a name in `KERNELS`.
    out: the partitioning of the result where the inputs are divided over devices; else None.
    dtype: the dtype of the result.
    """
    *rows, inputs = jax.typeof(x).sharding.spec.partitions
    outputs = jax.typeof(codes).sharding.spec.partitions[1]
    divided = sharding.entries(inputs)
    result = P(*rows, outputs) if out is None else P(*out.partitions)
    product = functools.partial(_product, kernel=kernel, bits=bits, dtype=jnp.dtype(dtype))

    @jax.shard_map(out_specs=result, check_vma=False)  # a kernel's type says no mesh axes
    def local(x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> jax.Array:
        flat = product(x.reshape(-1, x.shape[-1]), codes, tables)
        part = flat.reshape(*x.shape[:-1], -1)
        if not divided:
            return part
        if set(divided) & set(sharding.entries(result[1])):  # the result is divided by tokens
            return jax.lax.psum_scatter(part, divided, scatter_dimension=1, tiled=True)
        return jax.lax.psum(part, divided)

    return local(x, codes, [scales] if zeros is None else [scales, zeros])


def _product(
    x: jax.Array,
    codes: jax.Array,
    tables: list[jax.Array],
    *,
    kernel: str,
    bits: int,
    dtype: DTypeLike,
) -> Float[Array, "B out"]:
    """Multiply the rows of one device; differentiable in x alone."""

    def of(tables: list[jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        return tables[0], tables[1] if len(tables) == 2 else None

    @jax.custom_vjp
    def product(x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> jax.Array:
        scales, zeros = of(tables)
        return KERNELS[kernel](x, codes, scales=scales, zeros=zeros, bits=bits, dtype=dtype)

    def forward(x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> tuple[jax.Array, Any]:
        return product(x, codes, tables), (codes, tables, jnp.zeros(0, x.dtype))

    def backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, None, None]:
        codes, tables, like = saved
        scales, zeros = of(tables)
        if scales.dtype == jnp.int16:
            scales = jax.lax.bitcast_convert_type(scales, jnp.float16)
        given = {"scales": scales, "zeros": zeros, "bits": bits}
        return of_rows(dy.astype(like.dtype), codes, **given), None, None

    product.defvjp(forward, backward)
    return product(x, codes, tables)
