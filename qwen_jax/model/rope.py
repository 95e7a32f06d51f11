"""Rotary position embedding (RoPE): the schemes that choose its frequencies and query scales.

A scheme is a frozen dataclass. On the host it computes `frequencies`, float32 [B, H/2], in the
precision of the original PyTorch code; `rotary` combines them with positions. Attention receives
only a rotation and a scale for each query, and does not know which scheme is active.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from qwen_jax.config import Config
from qwen_jax.runtime import values


@struct.dataclass
class Rotary:
    """The rotation of queries and keys at the tokens of one forward pass.

    cos, sin: float32 [B, T, H/2], of the angle of each pair of dimensions.
    query_scale: float32 [B, T], a factor on attention scores besides H**-0.5.
    """

    cos: jax.Array
    sin: jax.Array
    query_scale: jax.Array

    def rotate(self, x: Float[Array, "B T N H"]) -> jax.Array:
        """Rotate queries or keys x [B, T, N, H] in float32, and cast back.

        Dimension i is paired with i + H/2.
        """
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, :, None, :], self.sin[:, :, None, :]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Plain RoPE (arXiv 2104.09864): the angle of pair i at position p is p * base**(-2i/H).

    head_dim: H, the size of a head.
    base: the base of the frequencies.
    logn_length: the trained length, beyond which LogN scales queries; None turns LogN off.
    """

    head_dim: int
    base: float
    logn_length: int | None = None  # LogN: the trained length, None = off

    def alpha(self, lengths: np.ndarray) -> np.ndarray:
        """Return the NTK alpha of sequences of these lengths: 1, which changes nothing."""
        return np.ones(np.shape(lengths), np.float64)

    def frequencies(self, alpha: ArrayLike = 1.0) -> np.ndarray:
        """Compute the frequencies, float32 [..., H/2], for NTK factors alpha [...].

        The base becomes base * alpha**(H/(H-2)). Raises ValueError for an alpha below 1.
        """
        alpha = np.asarray(alpha, np.float64)
        if not (np.isfinite(alpha).all() and (alpha >= 1).all()):
            raise ValueError(f"ntk_alpha {alpha.tolist()}: must be at least 1")
        with np.errstate(over="ignore"):  # `_powers` refuses what has become infinite
            base = self.base * alpha ** (self.head_dim / (self.head_dim - 2))
        return _powers(base, self.head_dim)

    def temperature(self) -> float:
        """Return the constant factor of this scheme on every attention score: 1."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNTK(Rope):
    """The dynamic NTK scaling of the original code: a sequence's alpha follows from its length.

    trained_length: the length up to which alpha is 1.
    """

    trained_length: int = 0

    def alpha(self, lengths: np.ndarray) -> np.ndarray:
        """Compute max(2**ceil(log2(length / trained_length) + 1) - 1, 1) for each sequence."""
        ratio = np.maximum(np.asarray(lengths, np.float64), 1) / self.trained_length
        return np.maximum(2.0 ** np.ceil(np.log2(ratio) + 1) - 1, 1)


@dataclasses.dataclass(frozen=True)
class _Scaled(Rope):
    """Base of the schemes that extend the context by a fixed `factor` and take no NTK alpha."""

    factor: float = 1.0

    def frequencies(self, alpha: ArrayLike = 1.0) -> np.ndarray:
        """Return the frequencies [..., H/2] that `rope_scaling` names, in radians a token.

        alpha: the factor of dynamic NTK, which cannot be combined with it. Raises ValueError unless
        it is 1.
        """
        if np.any(np.asarray(alpha) != 1):
            raise ValueError("ntk_alpha goes with plain RoPE or dynamic NTK, not with rope_scaling")
        return np.broadcast_to(self._scaled(), (*np.shape(alpha), self.head_dim // 2))

    def _scaled(self) -> np.ndarray:
        """Compute the frequencies of the extended context, float32 [H/2]."""
        raise NotImplementedError


class Linear(_Scaled):
    """Position interpolation (arXiv 2306.15595, eq. 4): positions are divided by `factor`."""

    def _scaled(self) -> np.ndarray:
        return _powers(self.base, self.head_dim) / np.float32(self.factor)


class NTKAware(_Scaled):
    """NTK-aware scaling (arXiv 2309.00071, def. 1): the base becomes base * factor**(H/(H-2))."""

    def _scaled(self) -> np.ndarray:
        base = self.base * self.factor ** (self.head_dim / (self.head_dim - 2))
        return _powers(base, self.head_dim)


@dataclasses.dataclass(frozen=True)
class YarnPaper(_Scaled):
    """YaRN (arXiv 2309.00071, def. 2 and 3): NTK-by-parts frequencies and a temperature.

    trained_length: the context length before scaling.
    beta_fast, beta_slow: the number of turns at the two ends of the interpolation.
    attention_factor: a factor on queries and on keys; None computes it from `factor`.

    A pair that turns r times in the trained length keeps its frequency where r > beta_fast, is
    divided by `factor` where r < beta_slow, and is interpolated linearly in r between.
    """

    trained_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def _scaled(self) -> np.ndarray:
        plain = _powers(self.base, self.head_dim).astype(np.float64)
        kept = self._kept(plain)
        return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32)

    def _kept(self, plain: np.ndarray) -> np.ndarray:
        """Return the unscaled share of each frequency [H/2]; the rest is divided by `factor`.

        plain: the unscaled frequencies, float64 [H/2].
        """
        turns = self.trained_length * plain / (2 * math.pi)
        return np.clip((turns - self.beta_slow) / (self.beta_fast - self.beta_slow), 0, 1)

    def temperature(self) -> float:
        """Return 1/t, where sqrt(1/t) = 0.1 ln(factor) + 1 scales queries and keys (eq. 15).

        `attention_factor`, if given, takes the place of sqrt(1/t).
        """
        if self.attention_factor is not None:
            return self.attention_factor**2
        return (0.1 * math.log(self.factor) + 1) ** 2


@dataclasses.dataclass(frozen=True)
class Yarn(YarnPaper):
    """YaRN as Hugging Face and vLLM compute it, and as checkpoints are trained with it.

    Unlike the paper's, the interpolation is linear in the index of the pair. It runs from the pair
    that turns beta_fast times in the trained length to the pair that turns beta_slow times.

    truncate: round these two indices outwards to whole pairs.
    mscale, mscale_all_dim: determine the temperature, if both are given and attention_factor is
        not.
    """

    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def _kept(self, plain: np.ndarray) -> np.ndarray:
        first, last = self._pair(self.beta_fast), self._pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.head_dim - 1)
        width = last - first or 0.001
        return 1 - np.clip((np.arange(len(plain)) - first) / width, 0, 1)

    def _pair(self, turns: float) -> float:
        """Return the index, with a fraction, of the pair of elements that rotates `turns` times.

        It does so within the trained length (YaRN, arXiv:2309.00071, section 3.2).
        """
        length = self.trained_length / (2 * math.pi * turns)
        return self.head_dim * math.log(length) / (2 * math.log(self.base))

    def temperature(self) -> float:
        """Return the paper's temperature, or if both mscales are given the square of their ratio.

        Each mscale m enters the ratio as 0.1 m ln(factor) + 1.
        """
        if self.attention_factor is None and self.mscale and self.mscale_all_dim:
            ratio = [
                0.1 * m * math.log(self.factor) + 1 for m in (self.mscale, self.mscale_all_dim)
            ]
            return (ratio[0] / ratio[1]) ** 2
        return super().temperature()


def from_config(config: Config) -> Rope:
    """Return the RoPE scheme that a config describes."""
    logn = config.seq_length if config.logn else None
    scaling = config.rope_scaling
    if scaling is None and config.dynamic_ntk:
        return DynamicNTK(config.head_dim, config.rope_base, logn, config.seq_length)
    if scaling is None:
        return Rope(config.head_dim, config.rope_base, logn)
    plain = (config.head_dim, config.rope_base, logn, scaling.factor)
    if scaling.type == "linear":
        return Linear(*plain)
    if scaling.type == "ntk":
        return NTKAware(*plain)
    trained = scaling.original_max_position_embeddings
    assert trained is not None  # RopeScaling checks it
    paper = (*plain, trained, scaling.beta_fast, scaling.beta_slow, scaling.attention_factor)
    if scaling.type == "yarn_paper":
        return YarnPaper(*paper)
    return Yarn(*paper, scaling.truncate, scaling.mscale, scaling.mscale_all_dim)


def rotary(
    rope: Rope, positions: Int[Array, "B T"], *, frequencies: Float[Array, "B pairs"]
) -> Rotary:
    """Compute the rotation of tokens at `positions`, int32 [B, T] from 0, for frequencies [B, H/2].

    LogN (Su 2021; Qwen report, section 2.3): the query of a token at 1-based position p beyond the
    trained length n is multiplied by log(p)/log(n).
    """
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
    scale = jnp.full_like(angles[:, :, 0], rope.temperature())
    if rope.logn_length is not None:
        place = jnp.maximum(positions + 1, rope.logn_length).astype(jnp.float32)
        logn = jnp.log(place) / np.float32(math.log(rope.logn_length))
        scale = scale * jnp.where(positions < rope.logn_length, 1, logn)
    return Rotary(jnp.cos(angles), jnp.sin(angles), scale)


def _powers(base: ArrayLike, head_dim: int) -> np.ndarray:
    """Compute base**(-2i/H), float32 [..., H/2], rounded as in the original PyTorch code.

    base: a number or an array [...].

    Raises ValueError for a base beyond float32.
    """
    if np.any(np.asarray(base) > values.FLOAT32):
        raise ValueError(
            f"a RoPE base of {np.max(base):g}, scaled by ntk_alpha or rope_scaling: must be at "
            f"most {values.FLOAT32:g}, the largest of float32"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(np.asarray(base, np.float32)[..., None], exponents)
