"""A weight with a low-rank adapter (LoRA, arXiv 2106.09685), as one leaf of a decoder."""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from qwen_jax.leaves.weights import Leaf, Weight, product, scaled_product
from qwen_jax.meshes import sharding
from qwen_jax.meshes.dropout import drop


@struct.dataclass
class Lora(Leaf):
    """A frozen weight with a low-rank adapter. Products with it are those of base + scale * b a.

    base: the frozen weight, a leaf of any kind.
    a, b: the adapter's factors, [R, inputs] and [outputs, R].
    key: uint32 [2], the PRNG key of the dropout on the input of `a`; None for no dropout.
    scale: the factor on the adapter's product.
    dropout: the share of the input of `a` that dropout sets to 0.
    """

    base: Weight | Leaf
    a: Weight
    b: Weight
    key: UInt32[Array, "... 2"] | None
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)


@product.register
def _(weight: Lora, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    def dropped(x: jax.Array) -> jax.Array:
        if weight.key is None:
            return x
        return drop(x, jax.random.wrap_key_data(weight.key), rate=weight.dropout)

    whole = product(weight.base, equation, x, out, **kwargs)
    return whole + added(
        weight.a,
        weight.b,
        scale=weight.scale,
        equation=equation,
        x=x,
        out=out,
        before=dropped,
        **kwargs,
    )


def added(
    a: Weight,
    b: Weight,
    *,
    scale: float,
    equation: str,
    x: jax.Array,
    out: P | None,
    before: Callable[[jax.Array], jax.Array] = lambda x: x,
    keep: Callable[[jax.Array], jax.Array] = lambda low: low,
    **kwargs: Any,
) -> jax.Array:
    """Multiply an activation x by scale * b a, which adapters add to a weight.

    a, b: the factors, [R, inputs] and [outputs, R].
    equation: the einsum equation of the product with the whole weight, such as "BTD,FD->BTF".
    out: the partitioning of the result of a row-parallel product; None for other products.
    before, keep: what is done to x, and to the product a x [B, T, R], on the way.
    """
    given, leaf, result = equation.replace("->", ",").split(",")
    spec = jax.typeof(x).sharding.spec
    # Both small products stay local, and gradients are summed over devices where they have R
    # columns, not the model width.
    low = before(jax.reshard(x, P(*spec.partitions)) if spec.reduced else x)
    into = None if out is None else P(*out.partitions[:-1], None)
    low = product(a, f"{given},R{leaf[1]}->{given[:-1]}R", low, into, **kwargs)
    low = keep(low)
    if spec.reduced:
        low = jax.reshard(low, P(*jax.typeof(low).sharding.spec, reduced=spec.reduced))
    _, tokens, _ = jax.typeof(low).sharding.spec.partitions
    if sharding.TENSOR in sharding.entries(tokens):
        # The residual stream is split by tokens, so each device of `tp` computes only a partial
        # gradient of b.
        held = jax.typeof(b[...]).sharding.spec
        held = P(*held.partitions, reduced=held.reduced | {sharding.TENSOR})
        b = Weight(jax.reshard(b[...], held), letters=b.letters)
    up = f"{given[:-1]}R,{leaf[0]}R->{result}"
    return scaled_product(b, scale, equation=up, x=low, out=None, **kwargs)
