"""Calls of the kernels that multiply by weights in groups, on any mesh, with their gradient.

Each device multiplies its own rows by its own part of the weight; where the inputs are divided, the
partial products are summed. The gradient of the rows never holds the weight as floats, either: a
block of its outputs at a time is dequantised. Weights in groups are never trained.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int16, UInt8, UInt32

from qwen_jax.kernels.grouped_tpu import tpu_product
from qwen_jax.kernels.grouped_triton import triton_product
from qwen_jax.kernels.grouped_xla import by_groups, one_row
from qwen_jax.meshes import sharding

_COLUMNS = 1024  # outputs of a weight that are dequantised at a time


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


KERNELS: dict[str, Product] = {
    "pallas_tpu": tpu_product,
    "pallas_triton": _on_gpus,
    "by_groups": by_groups,  # for CPUs
}
# Dequantises codes [W, out] with scales and zeros [groups, out] to floats [in, out] of a dtype.
Dequantise = Callable[..., jax.Array]


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
    dequantise: Dequantise,
) -> Float[Array, "B T out"]:
    """Multiply an activation by a weight in groups with a kernel. Returns [B, T, out].

    codes, scales, zeros, bits: the fields of `Grouped`.
    kernel: a name in `KERNELS`.
    out: the partitioning of the result where the inputs are divided over devices; else None.
    dtype: the dtype of the result.
    dequantise: the function that makes floats of part of the weight, for the gradient.
    """
    *rows, inputs = jax.typeof(x).sharding.spec.partitions
    outputs = jax.typeof(codes).sharding.spec.partitions[1]
    divided = sharding.entries(inputs)
    result = P(*rows, outputs) if out is None else P(*out.partitions)
    product = functools.partial(
        _product, kernel=kernel, bits=bits, dtype=jnp.dtype(dtype), dequantise=dequantise
    )

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
    x: jax.Array, codes: jax.Array, tables: list[jax.Array], **how: Any
) -> Float[Array, "B out"]:
    """Multiply the rows of one device; differentiable in x alone."""
    kernel, bits, dtype = how["kernel"], how["bits"], how["dtype"]

    @jax.custom_vjp
    def product(x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> jax.Array:
        scales, zeros = tables[0], tables[1] if len(tables) == 2 else None
        return KERNELS[kernel](x, codes, scales=scales, zeros=zeros, bits=bits, dtype=dtype)

    def forward(x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> tuple[jax.Array, Any]:
        return product(x, codes, tables), (codes, tables, jnp.zeros(0, x.dtype))

    def backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, None, None]:
        codes, tables, like = saved
        return _of_rows(dy.astype(like.dtype), codes, tables, how["dequantise"]), None, None

    product.defvjp(forward, backward)
    return product(x, codes, tables)


def _of_rows(
    dy: jax.Array, codes: jax.Array, tables: list[jax.Array], dequantise: Dequantise
) -> jax.Array:
    """Return the gradient of the rows [B, in] from that of the result [B, out].

    A block of outputs is dequantised at a time.
    """
    outputs = codes.shape[1]
    size = next((n for n in range(min(_COLUMNS, outputs), 0, -1) if outputs % n == 0), outputs)

    def blocks(x: jax.Array) -> jax.Array:  # [rows, out] -> [blocks, rows, size]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0)

    def step(total: jax.Array, some: tuple[jax.Array, jax.Array, list[jax.Array]]) -> Any:
        dy, codes, tables = some
        weight = dequantise(codes, *tables, dtype=dy.dtype)
        added = jnp.einsum("bo,io->bi", dy, weight, preferred_element_type=jnp.float32)
        return total + added, None

    inputs = jax.eval_shape(functools.partial(dequantise, dtype=dy.dtype), codes, *tables).shape[0]
    zero = jnp.zeros((dy.shape[0], inputs), jnp.float32)
    given = (blocks(dy), blocks(codes), [blocks(table) for table in tables])
    return jax.lax.scan(step, zero, given)[0].astype(dy.dtype)
