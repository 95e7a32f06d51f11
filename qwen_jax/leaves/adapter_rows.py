"""A weight with several low-rank adapters, of which each row of a batch uses one, or none.

So requests with different adapters run in one pass over the base model. The adapters' factors lie
one behind the other along the rank, as one adapter of a large rank, and each row of the batch uses
the columns that are its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int32

from qwen_jax.leaves import low_rank
from qwen_jax.leaves.weights import Leaf, Weight, product


@struct.dataclass
class AdapterRows(Leaf):
    """A weight with several low-rank adapters: a row's products are those of base + b_i a_i.

    The result of a row depends on its own adapter alone: it is the same, bit for bit, whatever
    adapters the other rows use. A row without an adapter, or whose adapter leaves this weight as
    it is, gets the base's own bits.

    base: the weight below, a leaf of any kind.
    a, b: the adapters' factors, [R, inputs] and [outputs, R], where R is the sum of their ranks.
        The scale of an adapter is part of its b.
    rows: int32 [B], the adapter of each row: i uses the adapter i - 1 of `ranks`, 0 none. None is
        0 for all rows; a decoder is flattened so, and gets its rows within a program.
    ranks: the rank of each adapter, 0 for one that leaves this weight as it is.
    """

    base: Weight | Leaf
    a: Weight
    b: Weight
    rows: Int32[Array, " B"] | None
    ranks: tuple[int, ...] = struct.field(pytree_node=False)

    def columns(self, rows: Int32[Array, " B"]) -> Bool[Array, "B R"]:
        """Return which of the R columns each row of a batch uses."""
        owners = np.repeat(np.arange(1, len(self.ranks) + 1, dtype=np.int32), self.ranks)
        return rows[:, None] == owners


@product.register
def _(weight: AdapterRows, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    whole = product(weight.base, equation, x, out, **kwargs)
    if weight.rows is None:
        return whole
    batch = jax.typeof(x).sharding.spec.partitions[0]
    own = weight.columns(jax.reshard(weight.rows, P(batch)))

    def keep(low: jax.Array) -> jax.Array:
        return jnp.where(own[:, None, :], low, jnp.zeros_like(low))

    # Sums over the columns of all adapters, where those of others are exact zeros.
    added = low_rank.added(
        weight.a, weight.b, scale=1.0, equation=equation, x=x, out=out, keep=keep, **kwargs
    )
    return jnp.where(jnp.any(own, axis=1)[:, None, None], whole + added, whole)
