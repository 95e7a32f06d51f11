"""A weight with a low-rank adapter on it (LoRA, arXiv 2106.09685): a leaf made of three others."""

from typing import Any

import jax
from flax import struct
from jax.sharding import PartitionSpec as P

from qwen_jax.leaves.weights import Leaf, Weight, product, scaled_product
from qwen_jax.meshes import sharding
from qwen_jax.meshes.dropout import drop


@struct.dataclass
class Lora(Leaf):
    """A weight with an adapter on it, which multiplies as `base + scale * b a` would.

    base: the weight below, of any kind. key: uint32 [2], which draws the dropout of what goes into
    `a`; None for no dropout.
    """

    base: Any
    a: Weight
    b: Weight
    key: Any
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)


@product.register
def _(weight: Lora, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    given, leaf, result = equation.replace("->", ",").split(",")
    whole = product(weight.base, equation, x, out, **kwargs)
    spec = jax.typeof(x).sharding.spec
    # Both small products are local; gradients are summed where there are R of them, not the width.
    low = jax.reshard(x, P(*spec.partitions)) if spec.reduced else x
    if weight.key is not None:
        low = drop(low, jax.random.wrap_key_data(weight.key), weight.dropout)
    into = None if out is None else P(*out.partitions[:-1], None)
    low = product(weight.a, f"{given},R{leaf[1]}->{given[:-1]}R", low, into, **kwargs)
    if spec.reduced:
        low = jax.reshard(low, P(*jax.typeof(low).sharding.spec, reduced=spec.reduced))
    b, (_, tokens, _) = weight.b, jax.typeof(low).sharding.spec.partitions
    if sharding.TENSOR in sharding.entries(tokens):
        # The residual is split by tokens, so each device of `tp` has a part of b's gradient.
        held = jax.typeof(b[...]).sharding.spec
        held = P(*held.partitions, reduced=held.reduced | {sharding.TENSOR})
        b = Weight(jax.reshard(b[...], held), letters=b.letters)
    up = f"{given[:-1]}R,{leaf[0]}R->{result}"
    return whole + scaled_product(b, weight.scale, up, low, None, **kwargs)
