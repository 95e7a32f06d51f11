"""How far a quantised model's predictions are from those of the float model: KL and perplexity."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32

from qwen_jax.leaves.weights import Leaf, Weight
from qwen_jax.model import vocabulary

_BYTES = 2**28  # of float32 logits that are held at once, each of a few times


@struct.dataclass
class Scores:
    """Sums over target tokens, float32 [].

    before, after: the negative log-likelihood by the float and by the quantised model.
    kl: the Kullback-Leibler divergence from the float model's distribution to the quantised one's.
    targets: the number of target tokens.
    """

    before: Float[Array, ""]
    after: Float[Array, ""]
    kl: Float[Array, ""]
    targets: Float[Array, ""]


@jax.jit
def scores(
    float_last: Float[Array, "B T D"],
    last: Float[Array, "B T D"],
    *,
    float_head: Weight,
    head: Weight | Leaf,
    tokens: Int32[Array, "B T"],
    targets: Bool[Array, "B T"],
) -> Scores:
    """Compare the predictions of two models for the same tokens.

    float_last, last: the outputs after the final norm, of the float and the quantised model.
    float_head, head: their heads [V, D].
    targets: True for tokens whose next token in the row is to be predicted.
    """
    rows, length = tokens.shape
    following = jnp.roll(tokens, -1, axis=1)
    size = _piece(length, rows * float_head.shape[0] * 4)

    def piece(start: Int32[Array, ""]) -> Scores:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        p, q = (
            jax.nn.log_softmax(vocabulary.logits(cut(x, axis=1), weights))
            for x, weights in ((float_last, float_head), (last, head))
        )
        spec: P = jax.typeof(p).sharding.spec
        ids = jnp.arange(p.shape[-1])
        is_target = jax.reshard(cut(following, axis=1)[..., None] == ids, spec)
        counted = cut(targets, axis=1)

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(counted, jnp.sum(x, axis=-1), 0))

        before, after = (-total(jnp.where(is_target, x, 0)) for x in (p, q))
        kl = total(jnp.exp(p) * (p - q))
        return Scores(before, after, kl, jnp.sum(counted, dtype=jnp.float32))

    def add(sums: Scores, start: Int32[Array, ""]) -> tuple[Scores, None]:
        return jax.tree.map(jnp.add, sums, piece(start)), None

    none = Scores(*jnp.zeros(4, jnp.float32))
    return jax.lax.scan(add, none, jnp.arange(0, length, size))[0]


def _piece(length: int, bytes_of_token: int) -> int:
    """Return how many tokens of a row are scored at once: a divisor of `length`.

    bytes_of_token: the bytes of the logits of one token of all rows.
    """
    most = max(1, _BYTES // bytes_of_token)
    return max(n for n in range(1, min(length, most) + 1) if length % n == 0)
