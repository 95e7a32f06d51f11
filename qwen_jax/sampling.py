"""How the next token is chosen from logits. Knows nothing of models or tokenizers.

A sampler is a pytree of numbers, so changing a temperature compiles nothing again. The order is the
original's: repetition penalty, temperature, top-k, top-p. Rows are independent of each other.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Greedy:
    """The largest logit, after the repetition penalty (1 = none)."""

    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raise ValueError for a setting out of range."""
        _check_penalty(self.repetition_penalty)

    def scores(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        """logits float32 [B, V], seen bool [B, V] -> the penalised logits."""
        return _penalise(logits, seen, self.repetition_penalty)

    def __call__(
        self, logits: jax.Array, seen: jax.Array, seeds: jax.Array, step: Any
    ) -> jax.Array:
        """int32 [B]: the token chosen for each row."""
        return jnp.argmax(self.scores(logits, seen), axis=-1).astype(jnp.int32)


@struct.dataclass
class Nucleus:
    """A draw from the smallest set of most likely tokens that holds `top_p` of the probability.

    temperature > 0; top_k: only the k most likely tokens (0 = all; ties with the last are kept);
    top_p in [0, 1] (Holtzman et al., arXiv 1904.09751); repetition_penalty (Keskar et al., arXiv
    1909.05858): logits of tokens already in the row are divided by it where positive, else
    multiplied.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raise ValueError for a setting out of range."""
        _check_penalty(self.repetition_penalty)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature}: must be positive (0: use Greedy)")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k {self.top_k}: must be a whole number, 0 for no limit")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be from 0 to 1")

    def scores(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        """logits float32 [B, V], seen bool [B, V] -> logits of the distribution drawn from."""
        logits = _penalise(logits, seen, self.repetition_penalty) / self.temperature
        top_k = jnp.where(self.top_k > 0, jnp.float32(self.top_k), jnp.inf)
        logits = _keep_largest(logits, (logits >= -jnp.inf).astype(jnp.float32), top_k)
        # At top_p = 1 nothing may be cut, though a float32 sum reaches 1 before the last token.
        mass = jnp.where(self.top_p < 1, jnp.maximum(self.top_p, 1e-30), jnp.inf)
        return _keep_largest(logits, jax.nn.softmax(logits, axis=-1), mass)

    def __call__(
        self, logits: jax.Array, seen: jax.Array, seeds: jax.Array, step: Any
    ) -> jax.Array:
        """int32 [B]: a draw that depends on the row's seed, uint32 [B], the step and its logits."""

        def noise(seed: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), step)
            return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

        scores = self.scores(logits, seen)
        return jnp.argmax(scores + jax.vmap(noise)(seeds), axis=-1).astype(jnp.int32)


def _check_penalty(penalty: float) -> None:
    if not (math.isfinite(penalty) and penalty > 0):
        raise ValueError(f"repetition_penalty {penalty}: must be positive (1 = none)")


def _penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _keep_largest(logits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """-inf for all but the fewest largest logits whose weights sum to `target` or more.

    The threshold is found by bisection over the bits of float32, which order like integers: 32 sums
    instead of a sort of the vocabulary, on any sharding of it. Equal logits are kept together.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    order = order + (order == -1).astype(jnp.int32)  # -0 is no smaller than 0

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the threshold is at least low, and below high
        middle = (low & high) + ((low ^ high) >> 1)
        kept = jnp.sum(jnp.where(order >= middle, weights, 0), axis=-1, keepdims=True)
        enough = kept >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # Made of the logits, so as to be partitioned like them.
    ends = [order[:, :1] * 0 + jnp.int32(end) for end in (-(2**31), 2**31 - 1)]
    threshold, _ = jax.lax.fori_loop(0, 32, halve, tuple(ends))
    return jnp.where(order >= threshold, logits, -jnp.inf)
