"""Samplers, which choose the next token from logits. They know nothing of models or tokenizers.

A sampler is a pytree of numbers, so that a changed temperature compiles nothing again. The settings
apply in the order of the original PyTorch code: repetition penalty, temperature, top-k, top-p. Each
sequence has all its logits and is independent of the others; nothing here knows of devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt

from qwen_jax.runtime import texts, values

_TINY, _LARGEST = values.POSITIVE  # normal float32 numbers: hardware rounds smaller ones to 0
_HOTTEST = 2.0**64  # probabilities are equal from this temperature on; a power of 2 keeps order
_SAFE = 1e38  # scores up to here leave room for rounding below the largest float32

# The reasons why no token can be chosen for a row, by the codes that `faults` returns.
FAULTS = {
    1: "a logit is NaN or infinite",
    2: "every logit is -infinity or of an id that may not be generated",
}


@struct.dataclass
class Greedy:
    """Chooses the token with the largest logit, after the repetition penalty.

    repetition_penalty: divides positive logits of tokens already in the sequence, and multiplies
        negative ones; 1 changes nothing.
    """

    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raise ValueError if the repetition penalty is out of range."""
        _check_penalty(self.repetition_penalty)

    def scores(
        self, logits: Float[Array, "B V"], seen: Bool[Array, "#B #V"]
    ) -> Float[Array, "B V"]:
        """Return the logits after the repetition penalty, float32 [B, V].

        seen: bool [B, V], True for ids that the sequence already contains.
        """
        return penalise(logits, seen, penalty=self.repetition_penalty)

    def __call__(
        self,
        logits: Float[Array, "B V"],
        seen: Bool[Array, "#B #V"],
        *,
        seeds: UInt[Array, " B"],
        step: Int[Array, ""],
    ) -> Int[Array, " B"]:
        """Choose the next token of each sequence, int32 [B].

        seen: True for ids that the sequence already contains.
        seeds, step: have no effect, as nothing is drawn.
        """
        return jnp.argmax(self.scores(logits, seen), axis=-1).astype(jnp.int32)


@struct.dataclass
class Nucleus:
    """Draws from the smallest set of most likely tokens that holds `top_p` of the probability.

    temperature: above 0; divides the logits.
    top_k: keep only the k most likely tokens, and ties with the last of them; 0 keeps all.
    top_p: in [0, 1] (Holtzman et al., arXiv 1904.09751).
    repetition_penalty: divides positive logits of tokens already in the sequence, and multiplies
        negative ones (Keskar et al., arXiv 1909.05858).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raise ValueError if a setting is out of range."""
        _check_penalty(self.repetition_penalty)
        temperature = values.number("temperature", self.temperature)
        if not 0 < temperature <= _LARGEST:
            raise ValueError(
                f"temperature {texts.shown(temperature)}: must be positive, and finite in float32; "
                "0, or from Python Greedy(), takes the most likely token"
            )
        top_k = values.number("top_k", self.top_k)
        if not (0 <= top_k <= _LARGEST and top_k % 1 == 0):
            raise ValueError(f"top_k {texts.shown(top_k)}: must be a whole number, 0 for no limit")
        values.number("top_p", self.top_p, least=0, most=1)

    def scores(
        self, logits: Float[Array, "B V"], seen: Bool[Array, "#B #V"]
    ) -> Float[Array, "B V"]:
        """Return the logits of the distribution that tokens are drawn from, float32 [B, V].

        seen: bool [B, V], True for ids that the sequence already contains.

        Tokens that are cut off by top-k or top-p have -inf.
        """
        logits = divide(penalise(logits, seen, penalty=self.repetition_penalty), self.temperature)

        def most_likely(logits: jax.Array) -> jax.Array:
            return keep_largest(logits, (logits >= -jnp.inf).astype(jnp.float32), target=self.top_k)

        def nucleus(logits: jax.Array) -> jax.Array:
            mass = jnp.maximum(self.top_p, 1e-30)  # 0 keeps the most likely token
            return keep_largest(logits, jax.nn.softmax(logits, axis=-1), target=mass)

        # At top_p = 1 nothing may be cut, though a float32 sum reaches 1 before the last token.
        return _where_on(
            self.top_p < 1, nucleus, logits=_where_on(self.top_k > 0, most_likely, logits=logits)
        )

    def __call__(
        self,
        logits: Float[Array, "B V"],
        seen: Bool[Array, "#B #V"],
        *,
        seeds: UInt[Array, " B"],
        step: Int[Array, ""],
    ) -> Int[Array, " B"]:
        """Draw the next token of each sequence, int32 [B].

        seen: True for ids that the sequence already contains.
        seeds: the seed of each sequence.
        step: the number of tokens chosen before.

        A draw depends only on the sequence's own seed, the step, and the sequence's logits.
        """

        scores = self.scores(logits, seen)
        steps = jnp.broadcast_to(step, seeds.shape)
        drawn = scores + noise(seeds, steps, size=logits.shape[-1])
        return jnp.argmax(drawn, axis=-1).astype(jnp.int32)


Sampler = Greedy | Nucleus


def noise(
    seeds: UInt[Array, " B"], steps: Int[Array, " B"], *, size: int
) -> Float[Array, "B {size}"]:
    """Draw the Gumbel noise that makes the largest score a sample of the distribution.

    seeds: the seed of each sequence.
    steps: the number of tokens chosen before for each sequence.
    """

    def of_row(seed: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, (size,), jnp.float32)

    return jax.vmap(of_row)(seeds, steps)


def faults(
    sampler: Sampler, logits: Float[Array, "B V"], *, seen: Bool[Array, "#B #V"]
) -> Int[Array, " B"]:
    """Return for each sequence why no token can be chosen: int32 [B], a code in `FAULTS`, else 0.

    seen: True for ids that the sequence already contains.

    A logit of -inf forbids an id and is no fault. Logits that overflow through the repetition
    penalty count as infinite.
    """
    logits = penalise(logits, seen, penalty=sampler.repetition_penalty)
    broken = jnp.any(~(logits < jnp.inf), axis=-1)  # also True for NaN
    empty = ~jnp.any(logits > -jnp.inf, axis=-1)
    return jnp.where(broken, 1, jnp.where(empty, 2, 0)).astype(jnp.int32)


def _check_penalty(penalty: float) -> None:
    penalty = values.number("repetition_penalty", penalty)
    if not _TINY <= penalty <= _LARGEST:
        raise ValueError(
            f"repetition_penalty {texts.shown(penalty)}: must be positive, and a normal number of "
            f"float32, from {_TINY:.3g} to {_LARGEST:.3g} (1 = none)"
        )


def penalise(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "#B #V"],
    *,
    penalty: ArrayLike,
) -> Float[Array, "B V"]:
    """Apply the repetition penalty to the logits of the ids that a sequence contains.

    penalty: divides positive logits, and multiplies negative ones; one, or [B, 1].
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def divide(logits: Float[Array, "B V"], temperature: ArrayLike) -> Float[Array, "B V"]:
    """Divide logits by a temperature, after a shift of logits whose quotient would overflow.

    temperature: one, or [B, 1].

    The shift does not change the probabilities. Temperatures below float32's smallest normal number
    act as that number, and beyond `_HOTTEST` all probabilities are equal.
    """
    temperature = jnp.clip(temperature, _TINY, _HOTTEST)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # A softmax is invariant to a shift. Only large logits are shifted, as it rounds once more.
    shift = jnp.where(jnp.abs(largest) > _SAFE * temperature, largest, 0)
    return (logits - shift) / temperature


def _where_on(
    on: jax.Array | bool, cut: Callable[[jax.Array], jax.Array], *, logits: jax.Array
) -> jax.Array:
    """Apply the filter `cut` to the logits if `on` is true; otherwise skip its computation."""
    return jax.lax.cond(on, cut, lambda logits: logits, logits)


def keep_largest(
    logits: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    *,
    target: ArrayLike,
) -> Float[Array, "B V"]:
    """Keep the fewest largest logits whose weights sum to at least `target`; others become -inf.

    target: one, or [B, 1].

    The threshold is found by bisection over the bits of float32, which order like integers: 32 sums
    instead of a sort of the vocabulary, on any sharding of it. Equal logits are kept together.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    order = order + (order == -1).astype(jnp.int32)  # -0 is no smaller than 0

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the threshold is at least low, and below high
        middle = (low & high) + ((low ^ high) >> 1)
        kept = jnp.sum(jnp.where(order >= middle, weights, 0), axis=-1, keepdims=True)
        enough = kept >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # Computed from the logits, so that the bounds have their partitioning.
    ends = [order[:, :1] * 0 + jnp.int32(end) for end in (-(2**31), 2**31 - 1)]
    threshold, _ = jax.lax.fori_loop(0, 32, halve, tuple(ends))
    return jnp.where(order >= threshold, logits, -jnp.inf)
