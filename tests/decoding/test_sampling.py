import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwen_jax.decoding import sampling
from qwen_jax.decoding.sampling import Greedy, Nucleus

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "model.json").read_text())["sample.cases"]
NONE = np.zeros((1, 1), bool)  # no id is in the row yet


@jax.jit
def scores(sampler: Greedy | Nucleus, logits: jax.Array, seen: jax.Array) -> jax.Array:
    return sampler.scores(logits, seen)


@jax.jit
def noise(seeds: jax.Array, step: int) -> jax.Array:
    """Gumbel noise for 40 ids, by jax alone."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
    return jax.vmap(lambda key: jax.random.gumbel(key, (40,), jnp.float32))(keys)


@jax.jit
def draw(sampler: Greedy | Nucleus, logits, seen, seeds, step) -> jax.Array:
    return sampler(logits, seen, seeds=seeds, step=step)


def kept(sampler: Nucleus, row: list[float]) -> list[int]:
    """The ids that can be drawn."""
    return np.flatnonzero(np.isfinite(scores(sampler, jnp.float32([row]), NONE)[0])).tolist()


def reference(row: np.ndarray, k: int, p: float) -> tuple[np.ndarray, float]:
    """Probabilities after top-k and top-p, equal logits kept together, by sorting, in float64;
    and how near `p` comes to a sum that decides."""
    row = row.astype(np.float64)
    if k > 0:
        row = np.where(row >= np.sort(row)[::-1][min(k, row.size) - 1], row, -np.inf)
    probs = np.exp(row - row.max())
    probs /= probs.sum()
    margin = 1.0
    if p < 1:
        sums = [(level, probs[row >= level].sum()) for level in np.unique(row)[::-1]]
        margin = min(abs(total - p) for _, total in sums)
        threshold = next(level for level, total in sums if total >= p or total > 1 - 1e-9)
        row = np.where(row >= threshold, row, -np.inf)
    probs = np.exp(row - row.max())
    return probs / probs.sum(), margin


@functools.cache
def golden(name: str) -> np.ndarray:
    with safe_open(GOLDEN / "model.safetensors", "numpy") as file:
        return file.get_tensor(f"sample.{name}")


@pytest.mark.parametrize("i", range(len(CASES)))
def test_golden_probabilities(i):
    case = CASES[i]
    logits, ids = golden("logits"), golden("ids")
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    sampler = Nucleus(case["t"], case["k"], case["p"], case["rp"])
    sampler.check()
    probs = np.asarray(jax.nn.softmax(scores(sampler, logits, seen)))
    expected = golden(f"{i}.probs")
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    np.testing.assert_array_equal(probs > 0, expected > 0)


def test_golden_penalty_is_the_greedy_one_too():
    logits, ids = golden("logits"), golden("ids")
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
    np.testing.assert_allclose(scores(Greedy(1.3), logits, seen), expected, rtol=1e-6)
    chosen = draw(Greedy(1.3), logits, seen, np.zeros(4, np.uint32), 0)
    np.testing.assert_array_equal(chosen, expected.argmax(-1))
    assert chosen.dtype == jnp.int32


LOGITS = [1.0, 3.0, 2.0, 2.0, -1.0, 0.5]


@pytest.mark.parametrize(
    ("sampler", "ids"),
    [
        (Nucleus(), [0, 1, 2, 3, 4, 5]),
        (Nucleus(top_k=1), [1]),
        (Nucleus(top_k=2), [1, 2, 3]),  # the tie at the last place is kept
        (Nucleus(top_k=3), [1, 2, 3]),
        (Nucleus(top_k=4), [0, 1, 2, 3]),
        (Nucleus(top_k=6), [0, 1, 2, 3, 4, 5]),
        (Nucleus(top_k=2**31 - 1), [0, 1, 2, 3, 4, 5]),
        (Nucleus(top_p=0.0), [1]),
        (Nucleus(top_p=1e-9), [1]),
        (Nucleus(top_p=1.0), [0, 1, 2, 3, 4, 5]),
        (Nucleus(top_p=0.6), [1, 2, 3]),  # probabilities 0.490 and twice 0.180
        (Nucleus(top_p=0.48), [1]),
        (Nucleus(top_k=3, top_p=0.99), [1, 2, 3]),
        # Top-p counts what top-k has left: 0.490 of 0.850 is 0.576.
        (Nucleus(top_k=3, top_p=0.57), [1]),
        (Nucleus(temperature=100.0, top_p=0.6), [0, 1, 2, 3]),
        (Nucleus(temperature=1e-6), [1]),
    ],
)
def test_what_is_kept(sampler, ids):
    probs = np.asarray(jax.nn.softmax(scores(sampler, jnp.float32([LOGITS]), NONE)))[0]
    assert np.flatnonzero(probs).tolist() == ids


def test_top_p_one_cuts_nothing_however_small():
    """float32 sums reach 1 long before the last token."""
    row = [0.0] + [-40.0] * 63
    assert kept(Nucleus(top_p=1.0), row) == list(range(64))
    assert kept(Nucleus(top_p=0.999), row) == [0]


def test_ids_that_do_not_exist_are_never_kept():
    row = [-math.inf, 1.0, -math.inf, 0.0]
    for sampler in (Nucleus(), Nucleus(top_k=3), Nucleus(top_k=9), Nucleus(top_p=0.999)):
        assert kept(sampler, row) == [1, 3]
    assert kept(Nucleus(top_p=0.0), [-math.inf, -5.0]) == [1]
    many = np.full((64, 40), -np.inf, np.float32)
    many[:, [1, 3]] = 1.0, 0.0
    seeds = np.arange(64, dtype=np.uint32)
    drawn = draw(Nucleus(temperature=50.0), many, np.ones_like(many, bool), seeds, 0)
    assert set(np.unique(drawn)) == {1, 3}


def test_extreme_logits_stay_in_order():
    row = [3e38, -3e38, 1e-40, -1e-40, 0.0, -math.inf]
    assert kept(Nucleus(top_k=1), row) == [0]
    for value in (1.0, -1.0, 1e-30):  # neighbours among the float32 numbers are told apart
        near = np.nextafter(np.float32(value), np.float32(9))
        assert kept(Nucleus(top_k=1), [value, float(near), value]) == [1]
    assert kept(Nucleus(top_k=4), [-3e38, -2e38, -1.0, -1e-30, -2.0, -3.0]) == [2, 3, 4, 5]


@settings(max_examples=150)
@given(
    st.one_of(
        # Few different values: ties everywhere.
        st.lists(st.integers(-3, 3).map(float), min_size=12, max_size=12),
        st.lists(st.integers(-12_000, 12_000).map(lambda n: n / 1000), min_size=12, max_size=12),
    ),
    st.integers(0, 14),
    st.one_of(st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.floats(0, 1)),
    st.sampled_from([1.0, 0.7, 1.5]),
)
@example([0.0] * 12, 5, 0.5, 1.0)
def test_top_k_and_top_p_against_a_sort(row, k, p, temperature):
    logits = np.float32([row])
    divided = np.asarray(jnp.asarray(logits) / jnp.float32(temperature))
    expected, margin = reference(divided[0], k, p)
    assume(margin > 1e-5)  # nearer, the rounding of the sum decides
    got = jax.nn.softmax(scores(Nucleus(temperature, k, p), logits, NONE))[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(got) > 0, expected > 0)


def test_repetition_penalty_comes_before_temperature_and_top_k():
    logits, seen = np.float32([[2.0, 1.9, -1.0, 0.0]]), np.array([[True, False, True, True]])
    np.testing.assert_allclose(
        scores(Nucleus(temperature=0.5, repetition_penalty=1.25), logits, seen),
        [[3.2, 3.8, -2.5, 0.0]],
        rtol=1e-6,
    )
    cut = scores(Nucleus(top_k=1, repetition_penalty=1.25), logits, seen)
    assert np.isfinite(cut).tolist() == [[False, True, False, False]]
    rewarded = scores(Greedy(0.5), logits, seen)
    np.testing.assert_allclose(rewarded, [[4.0, 1.9, -0.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    "sampler", [Nucleus(), Nucleus(0.7, 5, 0.9), Nucleus(1.5, 0, 0.8, 1.2)], ids=str
)
def test_frequencies_match_the_probabilities(sampler):
    rng = np.random.default_rng(0)
    logits = np.repeat(rng.standard_normal((1, 16)).astype(np.float32) * 1.5, 20_000, 0)
    seen = np.repeat(rng.random((1, 16)) < 0.3, len(logits), 0)
    seeds = np.arange(len(logits), dtype=np.uint32)
    drawn = np.asarray(draw(sampler, logits, seen, seeds, 3))
    expected = len(drawn) * np.asarray(jax.nn.softmax(scores(sampler, logits[:1], seen[:1])))[0]
    counts = np.bincount(drawn, minlength=16)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    # A chi-square of n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1).
    freedom = likely.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_top_k_one_is_greedy():
    logits = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)
    seeds, seen = np.arange(64, dtype=np.uint32), np.zeros((64, 40), bool)
    for sampler in (Greedy(), Nucleus(top_k=1), Nucleus(top_p=0.0), Nucleus(temperature=1e-7)):
        np.testing.assert_array_equal(draw(sampler, logits, seen, seeds, 0), logits.argmax(-1))


def test_a_draw_depends_on_seed_step_and_row_alone():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 40)).astype(np.float32)
    seen = rng.random((64, 40)) < 0.2
    seeds = rng.integers(0, 2**32, 64, np.uint32)
    sampler = Nucleus(1.1, 30, 0.95, 1.1)

    def tokens(rows: np.ndarray, step: int = 5) -> list[int]:
        arrays = logits[rows], seen[rows], seeds[rows]
        return np.asarray(draw(sampler, *arrays, np.int32(step))).tolist()

    together = tokens(np.arange(64))
    assert tokens(np.arange(64)) == together
    alone = [tokens(np.array([i]))[0] for i in range(10)]
    assert alone == together[:10]
    order = rng.permutation(64)
    assert tokens(order) == [together[i] for i in order]

    # The same row again and again: steps and seeds differ.
    same = np.repeat(logits[:1], 64, 0), np.zeros((64, 40), bool)
    assert len(set(np.asarray(draw(Nucleus(), *same, seeds, 5)).tolist())) > 8
    steps = [int(draw(Nucleus(), *same, seeds, step)[0]) for step in range(30)]
    assert len(set(steps)) > 8


@pytest.mark.parametrize(
    "sampler",
    [Nucleus(), Nucleus(0.7, 5, 0.9), Nucleus(1.5, 0, 0.8, 1.2), Nucleus(0.3, 9)],
    ids=str,
)
def test_a_draw_is_the_largest_sum_of_score_and_gumbel_noise(sampler):
    """Of noise that follows from seed and step alone: a seed gives the same tokens for ever."""
    rng = np.random.default_rng(3)
    logits = 2 * rng.standard_normal((64, 40)).astype(np.float32)
    seen = rng.random((64, 40)) < 0.2
    seeds = rng.integers(0, 2**32, 64, np.uint32)
    penalty, temperature = sampler.repetition_penalty, sampler.temperature
    penalised = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    kept = [reference(row / temperature, sampler.top_k, sampler.top_p)[0] > 0 for row in penalised]
    expected = np.where(kept, penalised / temperature + noise(seeds, 7), -np.inf).argmax(-1)
    np.testing.assert_array_equal(draw(sampler, logits, seen, seeds, 7), expected)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e30])
@pytest.mark.parametrize("temperature", [1e-30, 3e-38, 1.2e-38, 1e-38, 1e-40, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature, scale):
    logits = np.float32(scale) * np.random.default_rng(1).standard_normal((64, 40), np.float32)
    logits[0] = -abs(logits[0])
    sampler = Nucleus(temperature, 0, 0.95, 1.1)
    sampler.check()
    seeds, seen = np.arange(64, dtype=np.uint32), np.zeros((64, 40), bool)
    seen[:, 3] = True
    expected = np.asarray(scores(Greedy(1.1), logits, seen)).argmax(-1)
    np.testing.assert_array_equal(draw(sampler, logits, seen, seeds, 0), expected)


@pytest.mark.parametrize("temperature", [1e18, 1e20, 3.4e38])
def test_a_huge_temperature_keeps_order_and_ids_that_do_not_exist_out(temperature):
    row = [0.5, -math.inf, 0.25, 30.0, -2.0, 0.0]
    assert kept(Nucleus(temperature), row) == [0, 2, 3, 4, 5]
    assert kept(Nucleus(temperature, top_k=2), row) == [0, 3]
    assert kept(Nucleus(temperature, top_p=0.0), row) == [3]
    probs = jax.nn.softmax(scores(Nucleus(temperature), jnp.float32([row]), NONE))[0]
    np.testing.assert_allclose(probs, [0.2, 0, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)


def test_a_share_that_float32_rounds_is_as_good_as_its_neighbour():
    for top_p in (1e-40, 5e-324):
        assert kept(Nucleus(top_p=top_p), LOGITS) == [1]
    assert kept(Nucleus(top_p=1 - 1e-12), LOGITS) == [0, 1, 2, 3, 4, 5]


def test_why_no_token_can_be_chosen():
    inf, nan = math.inf, math.nan
    rows = [[1, -inf, 0], [1, nan, 0], [1, inf, 0], [-inf] * 3, [nan] * 3, [3e38, 1, 2]]
    seen = np.zeros((6, 3), bool)
    find = jax.jit(sampling.faults)
    assert find(Nucleus(), np.float32(rows), seen=seen).tolist() == [0, 1, 1, 2, 1, 0]
    seen[5, 0] = True  # a penalty below 1 takes it over the largest float32
    assert find(Greedy(0.5), np.float32(rows), seen=seen).tolist() == [0, 1, 1, 2, 1, 1]
    everything = np.ones((1, 2), bool)
    assert find(Greedy(3e38), np.float32([[-9, -5]]), seen=everything).tolist() == [2]
    assert find(Greedy(3e38), np.float32([[-9, 5]]), seen=everything).tolist() == [0]


def test_no_threshold_is_searched_for_where_top_k_and_top_p_are_off():
    """Both searches are branches of conditions: outside of them, the program has no loop."""
    jaxpr = jax.make_jaxpr(lambda sampler, *rest: sampler.scores(*rest))
    program = jaxpr(Nucleus(), jnp.float32([LOGITS]), np.zeros((1, 6), bool)).jaxpr
    primitives = [equation.primitive.name for equation in program.eqns]
    assert primitives.count("cond") == 2
    assert not {"while", "scan", "reduce_sum", "exp"} & set(primitives)
    branches = [e.params["branches"] for e in program.eqns if e.primitive.name == "cond"]
    lengths = [sorted(len(branch.jaxpr.eqns) for branch in each) for each in branches]
    assert all(off == 0 < on for off, on in lengths)


def test_new_settings_compile_nothing_again():
    traces = []

    @jax.jit
    def traced(sampler: Nucleus, logits: jax.Array) -> jax.Array:
        traces.append(sampler)
        seen, seeds = jnp.zeros(logits.shape, bool), jnp.zeros(1, jnp.uint32)
        return sampler(logits, seen, seeds=seeds, step=0)

    for sampler in (Nucleus(), Nucleus(0.2), Nucleus(0.7, 5), Nucleus(0.7, 20, 0.3, 1.2)):
        traced(sampler, jnp.float32([LOGITS]))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (Greedy(0.0), "repetition_penalty"),
        (Greedy(math.inf), "repetition_penalty"),
        (Greedy(math.nan), "repetition_penalty"),
        (Nucleus(repetition_penalty=-1.0), "repetition_penalty"),
        (Nucleus(temperature=0.0), "temperature"),
        (Nucleus(temperature=-1.0), "temperature"),
        (Nucleus(temperature=math.inf), "temperature"),
        (Nucleus(temperature=math.nan), "temperature"),
        (Nucleus(top_k=-1), "top_k"),
        (Nucleus(top_k=2.5), "top_k"),  # type: ignore[arg-type]
        (Nucleus(top_p=-0.1), "top_p"),
        (Nucleus(top_p=1.1), "top_p"),
        (Nucleus(top_p=math.nan), "top_p"),
        # What is no number, or none of float32.
        (Nucleus(temperature=1e39), "temperature"),
        (Nucleus(temperature=10**400), "temperature"),
        (Nucleus(temperature="0.7"), "temperature"),  # type: ignore[arg-type]
        (Nucleus(temperature=True), "temperature"),
        (Nucleus(temperature=None), "temperature"),  # type: ignore[arg-type]
        (Nucleus(temperature=np.ones(2)), "temperature"),  # type: ignore[arg-type]
        (Nucleus(top_k=math.inf), "top_k"),  # type: ignore[arg-type]
        (Nucleus(top_k=math.nan), "top_k"),  # type: ignore[arg-type]
        (Nucleus(top_k=10**400), "top_k"),
        (Nucleus(top_k=np.bool_(True)), "top_k"),  # type: ignore[arg-type]
        (Nucleus(top_p=1j), "top_p"),  # type: ignore[arg-type]
        (Greedy(1e-40), "repetition_penalty"),
        (Greedy(1e39), "repetition_penalty"),
        (Greedy("1"), "repetition_penalty"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(sampler, name):
    with pytest.raises(ValueError, match=f"^{name} "):
        sampler.check()


def test_settings_in_range_pass():
    for sampler in (Greedy(), Greedy(0.5), Nucleus(), Nucleus(0.1, 3, 0.0, 2.0)):
        sampler.check()
    numpy = Nucleus(np.float16(0.5), np.int64(3), np.float64(0.5), np.float32(2))  # type: ignore
    arrays = Nucleus(jnp.float32(0.5), np.array(3), 1, jnp.int32(2))  # type: ignore[arg-type]
    for sampler in (numpy, arrays, Nucleus(1e-300), Nucleus(top_k=5.0)):  # type: ignore[arg-type]
        sampler.check()
