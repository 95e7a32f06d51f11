import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import RopeScaling
from qwen_jax.model import rope
from qwen_jax.model.rope import DynamicNTK, Rope, rotary
from tests.support.tiny import tiny_config

# The exponents are float32, as in the original: base**x moves by log(base) * 2**-24.
CLOSE = {"rtol": 2e-6}


def paper_frequencies(dim: int, base: float) -> np.ndarray:
    """theta_i = base**(-2 (i - 1) / d), i = 1 .. d/2: eq. 15 of arXiv 2104.09864, in float64."""
    return np.array([base ** (-2 * (i - 1) / dim) for i in range(1, dim // 2 + 1)])


def scheme(dim: int = 128, base: float = 10000, **changes) -> Rope:
    return rope.from_config(tiny_config(head_dim=dim, rope_base=base, **changes))


@pytest.mark.parametrize("base", [10000, 1000000, 500.5])
@pytest.mark.parametrize("dim", [16, 128])
def test_plain(dim, base):
    plain = scheme(dim, base)
    frequencies = plain.frequencies()
    assert frequencies.dtype == np.float32 and frequencies.shape == (dim // 2,)
    np.testing.assert_allclose(frequencies, paper_frequencies(dim, base), **CLOSE)
    assert plain.temperature() == 1
    # Plain RoPE has one alpha for every length.
    np.testing.assert_array_equal(plain.alpha(np.array([1, 10**6])), [1, 1])


@pytest.mark.parametrize(
    ("trained", "lengths", "alphas"),
    [
        (2048, [0, 1, 2047, 2048], [1, 1, 1, 1]),
        (2048, [2049, 4096, 4097, 8192], [3, 3, 7, 7]),
        (2048, [8193, 16384, 16385, 32768], [15, 15, 31, 31]),
        (8192, [1, 8192, 8193, 16384, 16385, 32768, 32769], [1, 1, 3, 3, 7, 7, 15]),
        (64, [64, 65, 100, 128, 129, 200], [1, 3, 3, 3, 7, 7]),  # the golden cases
        (6000, [6000, 6001, 12000, 12001, 24000, 24001], [1, 3, 3, 7, 7, 15]),
    ],
)
def test_dynamic_ntk_alpha(trained, lengths, alphas):
    dynamic = scheme(seq_length=trained, dynamic_ntk=True)
    assert isinstance(dynamic, DynamicNTK)
    np.testing.assert_array_equal(dynamic.alpha(np.array(lengths)), alphas)


def test_dynamic_ntk_frequencies_for_each_row():
    dynamic = scheme(128, 10000, seq_length=2048, dynamic_ntk=True)
    alphas = dynamic.alpha(np.array([100, 4096, 4097, 32768]))
    frequencies = dynamic.frequencies(alphas)
    assert frequencies.dtype == np.float32 and frequencies.shape == (4, 64)
    for row, alpha in zip(frequencies, (1, 3, 7, 31), strict=True):
        expected = paper_frequencies(128, 10000 * alpha ** (128 / 126))
        np.testing.assert_allclose(row, expected, **CLOSE)
    np.testing.assert_array_equal(frequencies[0], scheme().frequencies())


@pytest.mark.parametrize("alpha", [0.5, 0, -1, math.nan, math.inf, [1.0, 0.99], [3, math.nan]])
@pytest.mark.parametrize("dynamic", [False, True])
def test_alpha_below_one_is_refused(alpha, dynamic):
    with pytest.raises(ValueError, match="must be at least 1"):
        scheme(dynamic_ntk=dynamic).frequencies(alpha)


def test_a_base_that_float32_has_no_number_for_is_refused():
    large = scheme(16, 1e38, rope_scaling=RopeScaling("ntk", 100.0))
    for make in (lambda: scheme().frequencies(1e306), large.frequencies):
        with pytest.raises(ValueError, match=r"a RoPE base of .*: must be at most 3\.4"):
            make()


def scaled(kind: str, factor: float, trained: int = 2048, **more) -> Rope:
    return scheme(rope_scaling=RopeScaling(kind, factor, trained, **more))


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0, 3.7])
def test_linear_is_position_interpolation(factor):
    linear = scaled("linear", factor)
    expected = paper_frequencies(128, 10000) / factor
    np.testing.assert_allclose(linear.frequencies(), expected, **CLOSE)
    assert linear.temperature() == 1


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0, 3.7])
def test_ntk_aware(factor):
    """The lowest frequency is interpolated by the factor in full, the highest is left alone."""
    frequencies = scaled("ntk", factor).frequencies()
    plain = paper_frequencies(128, 10000)
    np.testing.assert_allclose(
        frequencies, paper_frequencies(128, 10000 * factor ** (128 / 126)), **CLOSE
    )
    np.testing.assert_allclose(frequencies[[0, -1]], plain[[0, -1]] / [1, factor], **CLOSE)


@pytest.mark.parametrize("trained", [2048, 8192])
@pytest.mark.parametrize(("slow", "fast"), [(1.0, 32.0), (2.0, 8.0)])
@pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
def test_paper_yarn_is_ntk_by_parts_with_a_temperature(factor, slow, fast, trained):
    yarn = scaled("yarn_paper", factor, trained, beta_fast=fast, beta_slow=slow)
    expected = []
    for theta in paper_frequencies(128, 10000):
        turns = trained / (2 * math.pi / theta)  # r(d) = L / wavelength
        if turns < slow:
            ramp = 0.0
        elif turns > fast:
            ramp = 1.0
        else:
            ramp = (turns - slow) / (fast - slow)
        expected.append((1 - ramp) * theta / factor + ramp * theta)
    np.testing.assert_allclose(yarn.frequencies(), expected, **CLOSE)
    # q and k are each multiplied by sqrt(1/t) = 0.1 ln(s) + 1: scores by its square.
    assert yarn.temperature() == pytest.approx((0.1 * math.log(factor) + 1) ** 2)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("slow", "fast"), [(1.0, 32.0), (2.0, 8.0)])
@pytest.mark.parametrize(
    ("dim", "base", "trained"), [(128, 1e6, 32768), (64, 1e4, 2048), (32, 5e6, 48), (16, 1e4, 16)]
)
@pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
def test_yarn_has_its_ramp_over_the_pair_index(factor, dim, base, trained, slow, fast, truncate):
    """Pair by pair: where in the row of pairs it lies between the two that turn so many times."""
    yarn = scaled_at(dim, base, factor, trained, beta_fast=fast, beta_slow=slow, truncate=truncate)
    # Pair i turns trained * base**(-2 i / dim) / (2 pi) times: solved for i.
    ends = [
        dim / 2 * (math.log(trained / (2 * math.pi * r)) / math.log(base)) for r in (fast, slow)
    ]
    if truncate:
        ends = [np.floor(ends[0]), np.ceil(ends[1])]
    low, high = max(ends[0], 0.0), min(ends[1], dim - 1.0)
    high += 0.001 if high == low else 0
    expected = []
    for i, theta in enumerate(paper_frequencies(dim, base)):
        divided = min(max((i - low) / (high - low), 0.0), 1.0)
        expected.append(divided * theta / factor + (1 - divided) * theta)
    np.testing.assert_allclose(yarn.frequencies(), expected, **CLOSE)
    assert yarn.temperature() == pytest.approx((0.1 * math.log(factor) + 1) ** 2)


def scaled_at(dim: int, base: float, factor: float, trained: int, **more) -> Rope:
    return scheme(dim, base, rope_scaling=RopeScaling("yarn", factor, trained, **more))


def test_yarn_by_hand():
    """Of Qwen2.5 and 3: H 128, base 1e6, 32768 tokens, factor 4. The pair that turns 32 times is
    64 ln(32768 / 64 pi) / ln 1e6 = 23.60, the one that turns once 39.65: the ramp goes from 23 to
    40, 17 pairs. Pair 32 is 9/17 on its way, and theta is 1e6 ** -0.5 = 0.001 there.
    """
    found = scaled_at(128, 1e6, 4.0, 32768).frequencies()
    np.testing.assert_allclose(found[32], 0.001 * (1 - 9 / 17 * 3 / 4), **CLOSE)
    theta = 1e6 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(found[:24], theta[:24], **CLOSE)
    np.testing.assert_allclose(found[40:], theta[40:] / 4, **CLOSE)
    paper = scheme(128, 1e6, rope_scaling=RopeScaling("yarn_paper", 4.0, 32768)).frequencies()
    assert abs(found[32] / paper[32] - 1) > 0.4, "the two are not the same model"


@pytest.mark.parametrize(
    ("dim", "base", "options", "pairs", "scaling"),
    [
        (
            64,
            1e6,
            (4.0, 64),
            [1, 0.17115123569965363, 0.04330432787537575, 3.84981632e-07],
            1.13862944,
        ),
        (
            32,
            5e6,
            (2.0, 48, 16.0, 2.0, 1.0, False),
            [1, 0.027727654203772545, 0.004032198339700699, 2.62232164e-07],
            1.0,
        ),
    ],
)
def test_yarn_is_that_of_transformers(dim, base, options, pairs, scaling):
    """Pairs 0, 3, 5 and the last, and the factor on cos and sin, of transformers 5.24.0."""
    yarn = scheme(dim, base, rope_scaling=RopeScaling("yarn", *options))
    np.testing.assert_allclose(yarn.frequencies()[[0, 3, 5, -1]], pairs, **CLOSE)
    assert yarn.temperature() == pytest.approx(scaling**2)


@pytest.mark.parametrize("kind", ["yarn", "yarn_paper"])
def test_yarn_attention_factor_replaces_the_temperature(kind):
    assert scaled(kind, 4.0, attention_factor=1.5).temperature() == pytest.approx(2.25)
    assert scaled(kind, 4.0, attention_factor=1.0).temperature() == 1


def test_yarn_mscales_are_a_ratio():
    both = {"mscale": 1.0, "mscale_all_dim": 0.5}
    ratio = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert scaled("yarn", 4.0, **both).temperature() == pytest.approx(ratio**2)
    assert scaled("yarn", 4.0, **both, attention_factor=1.5).temperature() == pytest.approx(2.25)
    plain = (0.1 * math.log(4) + 1) ** 2
    assert scaled("yarn", 4.0, mscale=0.5).temperature() == pytest.approx(plain), "one is none"


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "yarn_paper"])
def test_alpha_does_not_go_with_rope_scaling(kind):
    scheme = scaled(kind, 4.0)
    np.testing.assert_array_equal(scheme.alpha(np.array([1, 10**6])), [1, 1])
    rows = scheme.frequencies(np.ones(3))
    assert rows.shape == (3, 64) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.stack([scheme.frequencies()] * 3))
    for alpha in (3.0, [1.0, 3.0], math.nan):
        with pytest.raises(ValueError, match="not with rope_scaling"):
            scheme.frequencies(alpha)


def test_angles_are_float32_products_of_true_positions():
    plain = scheme(16)
    positions = np.array([[0, 1, 2, 1000, 32767], [5, 4, 3, 2, 1]], np.int32)
    rows = plain.frequencies(np.array([1.0, 7.0]))
    turned = rotary(plain, jnp.asarray(positions), frequencies=jnp.asarray(rows))
    assert turned.cos.dtype == turned.sin.dtype == turned.query_scale.dtype == jnp.float32
    angles = positions[:, :, None] * rows[:, None].astype(np.float64)
    # Half a unit in the last place of a float32 angle of up to 32767 is 2**-10.
    np.testing.assert_allclose(turned.cos, np.cos(angles), atol=2**-9)
    np.testing.assert_allclose(turned.sin, np.sin(angles), atol=2**-9)
    np.testing.assert_allclose(turned.cos[1], np.cos(angles[1]), atol=1e-6)
    np.testing.assert_array_equal(turned.query_scale, np.ones((2, 5)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rotate_is_a_complex_rotation(dtype):
    plain = scheme(16)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 3, 16)), dtype)
    positions = np.array([[0, 1, 2, 3, 4], [7, 30, 2, 9, 100]], np.int32)
    rows = plain.frequencies(np.array([1.0, 3.0]))
    turned = rotary(plain, jnp.asarray(positions), frequencies=jnp.asarray(rows)).rotate(x)
    assert turned.dtype == dtype and turned.shape == x.shape

    wide = np.asarray(x, np.float64)
    pairs = wide[..., :8] + 1j * wide[..., 8:]  # dimension i is paired with i + H/2
    angles = positions[:, :, None, None] * rows[:, None, None].astype(np.float64)
    pairs = pairs * np.exp(1j * angles)
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    # All is float32 until the cast back, which rounds to half a unit in the last place.
    rounding = 0 if dtype == jnp.float32 else 0.51 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, rtol=rounding, atol=2e-5)
    norms = np.linalg.norm(np.asarray(turned, np.float64), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(wide, axis=-1), rtol=1e-5 + rounding)


def test_scores_depend_on_distance_alone():
    plain = scheme(16)
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    row = jnp.asarray(plain.frequencies(np.ones(1)))

    def score(query: int, key: int) -> float:
        at = [rotary(plain, jnp.full((1, 1), p, jnp.int32), frequencies=row) for p in (query, key)]
        return float(jnp.sum(at[0].rotate(q) * at[1].rotate(k)))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@pytest.mark.parametrize("trained", [16, 2048, 8192])
def test_logn_scales_queries_at_true_positions_without_a_limit(trained):
    logn = scheme(16, seq_length=trained, logn=True)
    # 0-based; 32767 is token 32768, where the original's table ends.
    edges = [0, 1, trained - 2, trained - 1, trained, trained + 1, 32766, 32767, 32768, 500_000]
    positions = jnp.asarray([edges], jnp.int32)
    scale = rotary(
        logn, positions, frequencies=jnp.asarray(logn.frequencies(np.ones(1)))
    ).query_scale
    expected = [max(math.log(p + 1) / math.log(trained), 1.0) for p in edges]
    np.testing.assert_allclose(scale[0], expected, rtol=1e-6)
    assert float(scale[0, 4]) > 1 + 1e-6


def test_logn_goes_with_every_scheme():
    yarn = RopeScaling("yarn", 4.0, 16)
    both = scheme(16, seq_length=16, logn=True, rope_scaling=yarn)
    row = jnp.asarray(both.frequencies(np.ones(1)))
    scale = rotary(both, jnp.asarray([[0, 99]], jnp.int32), frequencies=row).query_scale
    temperature = (0.1 * math.log(4) + 1) ** 2
    expected = [temperature, temperature * math.log(100) / math.log(16)]
    np.testing.assert_allclose(scale[0], expected, rtol=1e-6)
    assert scheme(16, seq_length=16, dynamic_ntk=True, logn=True).logn_length == 16
    assert scheme(16, seq_length=16, dynamic_ntk=True).logn_length is None


def test_negative_positions_of_left_padding_are_harmless():
    logn = scheme(16, seq_length=4, logn=True)
    row = jnp.asarray(logn.frequencies(np.ones(1)))
    padded = rotary(logn, jnp.asarray([[-40, -2, -1, 0, 1, 5]], jnp.int32), frequencies=row)
    alone = rotary(logn, jnp.asarray([[0, 1, 5]], jnp.int32), frequencies=row)
    for mine, other in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_array_equal(mine[:, 3:], other)
    np.testing.assert_array_equal(padded.query_scale[0, :3], 1)


def test_schemes_are_values():
    assert scheme(dynamic_ntk=True) == scheme(dynamic_ntk=True)
    assert scheme(dynamic_ntk=True) != scheme()
    assert scaled("linear", 2.0) != scaled("ntk", 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme().base = 1  # type: ignore[misc]
