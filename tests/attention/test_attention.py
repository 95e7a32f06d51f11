import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import attention
from qwen_jax.attention import FULL, IMPLEMENTATIONS, Mask
from qwen_jax.attention.ring import merge
from qwen_jax.leaves.int8 import quantize
from qwen_jax.meshes.moves import place
from tests.support.tiny import KERNELS, QUICK, on_mesh

every_implementation = pytest.mark.parametrize("name", ["xla", *KERNELS])


@pytest.fixture(autouse=True)
def mesh():
    with on_mesh():
        yield


def reference(q, k, v, visible, scale, cotangents=None) -> dict[str, np.ndarray]:
    """o and lse, one query and head at a time, in float64; with cotangents of both, gradients."""
    q, k, v, scale = (np.asarray(x, np.float64) for x in (q, k, v, scale))
    groups = q.shape[2] // k.shape[2]
    out = {"o": np.zeros_like(q), "lse": np.full(q.shape[:3], -np.inf)}
    out |= {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    out["scale"] = np.zeros(q.shape[:2])
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(visible[b, t])
        if keys.size == 0:
            continue
        head = n // groups
        products = k[b, keys, head] @ q[b, t, n]
        scores = scale[b, t] * products
        out["lse"][b, t, n] = np.logaddexp.reduce(scores)
        probs = np.exp(scores - out["lse"][b, t, n])
        out["o"][b, t, n] = probs @ v[b, keys, head]
        if cotangents is None:
            continue
        do, dlse = (np.asarray(x, np.float64)[b, t, n] for x in cotangents)
        dprobs = v[b, keys, head] @ do
        dscores = probs * (dprobs - probs @ dprobs + dlse)
        out["q"][b, t, n] = scale[b, t] * dscores @ k[b, keys, head]
        out["k"][b, keys, head] += scale[b, t] * np.outer(dscores, q[b, t, n])
        out["v"][b, keys, head] += np.outer(probs, do)
        out["scale"][b, t] += dscores @ products
    return out


def mask_of(q_positions, k_positions, q_segments=1, k_segments=1, window: int = FULL) -> Mask:
    """Segments and positions broadcast; window by value."""
    q_positions, k_positions = np.asarray(q_positions), np.asarray(k_positions)
    values = [
        q_positions,
        k_positions,
        np.broadcast_to(q_segments, q_positions.shape),
        np.broadcast_to(k_segments, k_positions.shape),
    ]
    return Mask(*(jnp.asarray(x, jnp.int32) for x in values), jnp.int32(window))


def visible_by_rule(mask: Mask) -> np.ndarray:
    """bool [B, T, S], key by key."""
    q_positions, k_positions, q_segments, k_segments, window = (
        np.asarray(x) for x in jax.tree.leaves(mask)
    )
    out = np.zeros((*q_positions.shape, k_positions.shape[1]), bool)
    for b, t, s in np.ndindex(*out.shape):
        if q_segments[b, t] != k_segments[b, s] or k_segments[b, s] == 0:
            continue
        out[b, t, s] = 0 <= q_positions[b, t] - k_positions[b, s] < window
    return out


def inputs(batch: int, length: int, keys: int, heads: int, kv_heads: int) -> list[jax.Array]:
    """q, k, v and a scale for each query, float32, H = 32; scores of a few units."""
    rng = np.random.default_rng(7)
    shapes = [(batch, length, heads, 32), (batch, keys, kv_heads, 32), (batch, keys, kv_heads, 32)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return [jnp.asarray(x) for x in (*arrays, rng.uniform(0.1, 0.6, (batch, length)))]


@functools.partial(jax.jit, static_argnames="name", compiler_options=QUICK)
def run(name: str, q, k, v, scale, mask: Mask, cotangents) -> Any:
    """(o, lse) and the gradients of q, k, v and scale."""

    def attend(q, k, v, scale):
        return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse=True)

    out, pull = jax.vjp(attend, q, k, v, scale.astype(jnp.float32))
    return out, pull(cotangents)


@functools.partial(jax.jit, static_argnames=("name", "return_lse"))
def forward(name: str, q, k, v, scale, mask: Mask, return_lse: bool = False) -> Any:
    return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse=return_lse)


def close(got, wanted, what: str = "") -> None:
    """Equal to 1e-5 of the largest number, which is at least 1. Sums in float32 are added up in an
    order that depends on the program and the processor, so a smaller number is known no better.
    """
    wanted = np.asarray(wanted)
    largest = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros(wanted.shape)).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1, largest), err_msg=what)


def compare(name: str, arrays: list[jax.Array], mask: Mask, visible: np.ndarray) -> None:
    """Values, log-sum-exps and gradients, those through the log-sum-exp included."""
    rng = np.random.default_rng(8)
    shape = arrays[0].shape
    cotangents = [rng.standard_normal(s).astype(np.float32) for s in (shape, shape[:3])]
    expected = reference(*arrays[:3], visible, arrays[3], cotangents)
    (o, lse), gradients = run(name, *arrays, mask, tuple(jnp.asarray(x) for x in cotangents))
    assert o.dtype == lse.dtype == jnp.float32
    close(o, expected["o"], "o")
    close(lse, expected["lse"], "lse")
    for key, gradient in zip(("q", "k", "v", "scale"), gradients, strict=True):
        largest = np.abs(expected[key]).max()
        np.testing.assert_allclose(gradient, expected[key], atol=1e-5 * largest, err_msg=key)


ROW = np.arange(12)
SQUARE = {
    "causal": mask_of([ROW, ROW], [ROW, ROW]),
    "window": mask_of([ROW, ROW], [ROW, ROW], window=3),
    "window of one": mask_of([ROW, ROW], [ROW, ROW], window=1),
    "segments": mask_of(
        [ROW, [*range(5), *range(4), *range(3)]],
        [ROW, [*range(5), *range(4), *range(3)]],
        [[1] * 12, [1] * 5 + [2] * 4 + [3] * 3],
        [[1] * 12, [1] * 5 + [2] * 4 + [3] * 3],
    ),
    "segments in a window": mask_of(
        [ROW, [*range(7), *range(5)]],
        [ROW, [*range(7), *range(5)]],
        [[1] * 12, [1] * 7 + [2] * 5],
        [[1] * 12, [1] * 7 + [2] * 5],
        window=4,
    ),
    "left padding": mask_of(
        [ROW, ROW - 5], [ROW, ROW - 5], [[1] * 12, [0] * 5 + [1] * 7], [[1] * 12, [0] * 5 + [1] * 7]
    ),
    "all padding": mask_of([ROW, ROW], [ROW, ROW], [[1] * 12, [0] * 12], [[1] * 12, [0] * 12]),
}
# More keys than queries: what a pass sees of a cache, ring order and empty slots included.
OFFSET = {
    "offset": mask_of([np.arange(13, 17)] * 2, [np.arange(17)] * 2),
    "offset in a window": mask_of([np.arange(13, 17)] * 2, [np.arange(17)] * 2, window=6),
    "ring": mask_of(
        [[7, 8, 9, 10], [-2, -1, 0, 1]],
        [np.roll(np.arange(17), 3), np.roll(np.arange(17), -6)],
        [[1] * 4, [0, 0, 1, 1]],
        [np.roll([1] * 7 + [0] * 10, 3), [0] * 17],
    ),
}


@pytest.mark.parametrize("case", [*SQUARE, *OFFSET])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@every_implementation
def test_values_and_gradients(name, kv_heads, case):
    mask = {**SQUARE, **OFFSET}[case]
    sizes = mask.q_positions.shape[1], mask.k_positions.shape[1]
    compare(name, inputs(2, *sizes, 4, kv_heads), mask, visible_by_rule(mask))


@pytest.mark.parametrize("case", [*SQUARE, *OFFSET])
def test_visible_is_the_rule(case):
    mask = {**SQUARE, **OFFSET}[case]
    np.testing.assert_array_equal(mask.visible(), visible_by_rule(mask))


@every_implementation
def test_a_query_that_sees_nothing(name):
    """Zeros, not NaN: padding rows are computed like the others."""
    mask = SQUARE["left padding"]
    arrays = inputs(2, 12, 12, 4, 2)
    ones = jnp.ones((2, 12, 4, 32)), jnp.ones((2, 12, 4))
    (o, lse), gradients = run(name, *arrays, mask, ones)
    np.testing.assert_array_equal(o[1, :5], 0)
    np.testing.assert_array_equal(lse[1, :5], -np.inf)
    dq, dk, dv, dscale = (np.asarray(x) for x in gradients)
    for gradient in (dq, dk, dv, dscale):
        np.testing.assert_array_equal(gradient[1, :5], 0)
        assert np.isfinite(gradient).all()


@every_implementation
def test_what_is_not_visible_has_no_influence(name):
    mask = SQUARE["left padding"]
    q, k, v, scale = inputs(2, 12, 12, 4, 2)
    huge = [x.at[1, :5].set(1e30) for x in (k, v)]
    expected = forward(name, q, k, v, scale, mask)
    np.testing.assert_array_equal(forward(name, q, *huge, scale, mask), expected)


@every_implementation
def test_scale_may_be_one_number(name):
    q, k, v, _ = inputs(2, 12, 12, 4, 2)
    mask = SQUARE["causal"]
    o = forward(name, q, k, v, 0.25, mask)
    assert o.dtype == q.dtype and o.shape == q.shape
    close(o, forward(name, q, k, v, jnp.full((2, 12), 0.25), mask))
    close(o, reference(q, k, v, visible_by_rule(mask), np.full((2, 12), 0.25))["o"])


@every_implementation
def test_long_queries_go_in_blocks(name):
    """Three blocks of queries, the last one short; segments and windows cross their edges."""
    length = 1030
    position = np.concatenate([np.arange(480), np.arange(length - 480)])
    segment = np.concatenate([[0] * 7, [1] * 473, [2] * (length - 480)])
    mask = mask_of(position[None], position[None], segment[None], segment[None], window=40)
    visible = np.asarray(mask.visible())
    compare(name, inputs(1, length, length, 2, 1), mask, visible)


@every_implementation
def test_merge_of_parts_is_the_whole(name):
    q, k, v, scale = inputs(2, 12, 12, 4, 2)
    mask = SQUARE["left padding"]

    @jax.jit
    def in_parts(q, k, v, scale, mask):
        parts = []
        for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):
            positions, segments = mask.k_positions[:, cut], mask.k_segments[:, cut]
            part = dataclasses.replace(mask, k_positions=positions, k_segments=segments)
            attend = IMPLEMENTATIONS[name]
            parts.append(attend(q, k[:, cut], v[:, cut], part, scale, return_lse=True))
        return merge(parts)[0], merge(parts[::-1])[0]

    whole = forward(name, q, k, v, scale, mask)
    for merged in in_parts(q, k, v, scale, mask):  # early queries see nothing of the last part
        close(merged, whole)
        np.testing.assert_array_equal(merged[1, :5], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_implementation
def test_half_precision(name, dtype):
    arrays = inputs(2, 12, 12, 4, 2)
    arrays[3] = jnp.full((2, 12), 32**-0.5)  # kernels round a query that LogN scales
    q, k, v = (x.astype(dtype) for x in arrays[:3])
    mask = SQUARE["left padding"]
    assert forward(name, q, k, v, arrays[3], mask).dtype == dtype
    cotangents = jnp.ones(q.shape), jnp.ones(q.shape[:3])
    (wide, lse), gradients = run(name, q, k, v, arrays[3], mask, cotangents)
    assert wide.dtype == lse.dtype == jnp.float32
    expected = reference(q, k, v, visible_by_rule(mask), arrays[3])
    # Scores are float32; the weights of the values are rounded by half a unit.
    bound = 0.5 * float(jnp.finfo(dtype).eps) * float(np.abs(np.asarray(v, np.float32)).max())
    np.testing.assert_allclose(wide, expected["o"], atol=bound)
    close(lse, expected["lse"])
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


@every_implementation
def test_large_scores_do_not_overflow(name):
    q, k, v, scale = inputs(2, 12, 12, 4, 2)
    mask = SQUARE["causal"]
    visible = visible_by_rule(mask)
    expected = reference(100 * q, 100 * k, v, visible, scale)
    o, lse = forward(name, 100 * q, 100 * k, v, scale, mask, return_lse=True)
    # A score is a sum of 32 products, which cancel: it is known as well as the largest such sum
    # of their magnitudes, to half a unit for each product and for each of a few factors.
    keys = np.repeat(100 * np.asarray(k, np.float64), 2, axis=2)  # a key head for each query head
    products = np.einsum("BTNH,BSNH->BTNSH", 100 * np.asarray(q, np.float64), keys)
    products *= np.asarray(scale)[:, :, None, None, None]
    known = (32 + 8) * np.finfo(np.float32).eps / 2 * np.abs(products).sum(-1).max()
    np.testing.assert_allclose(lse, expected["lse"], rtol=0, atol=known)
    # So a key counts for certain only where its score stands out, and then it counts alone.
    scores = np.where(visible[:, :, None], products.sum(-1), -np.inf)
    second, first = np.sort(scores, axis=-1)[..., -2:].T
    clear = (first - second > 2 * known + 20).T
    assert clear.mean() > 0.9
    close(np.asarray(o)[clear], expected["o"][clear])


@pytest.mark.parametrize("symmetric", [True, False])
@every_implementation
def test_quantised_keys_and_values(name, symmetric):
    q, k, v, scale = inputs(2, 12, 12, 4, 2)
    mask = SQUARE["causal"]
    int8 = [quantize(x, symmetric) for x in (k, v)]
    o = forward(name, q, *int8, scale, mask)
    plain = [x.dequantize(jnp.float32) for x in int8]
    close(o, reference(q, *plain, visible_by_rule(mask), scale)["o"])


@every_implementation
def test_on_shards_is_the_same(name):
    row = np.arange(520)
    sizes = 4, 520, 520, 4, 2
    attend = IMPLEMENTATIONS[name]

    def both(mask, q, k, v, scale):
        def loss(q, k, v):
            o, lse = attention.on_shards(attend)(q, k, v, mask, scale, return_lse=True)
            return jnp.sum(o**2) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0)), o

        (_, o), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return o, *gradients

    results = []
    for axes in ({}, {"fsdp": 2, "tp": 2}):
        with on_mesh(**axes):
            mask = mask_of([row - 3] * 4, [row - 3] * 4, row >= 3, row >= 3, window=9)
            mask = jax.tree.map(lambda x: place(np.asarray(x), "BT"[: 2 * x.ndim // 2]), mask)
            letters = ("BTNH", "BTKH", "BTKH", "BT")
            arrays = [
                place(np.asarray(x), at) for x, at in zip(inputs(*sizes), letters, strict=True)
            ]
            results.append(
                [np.asarray(x) for x in jax.jit(both, compiler_options=QUICK)(mask, *arrays)]
            )
    for alone, sharded in zip(*results, strict=True):
        np.testing.assert_allclose(sharded, alone, atol=1e-5 * np.abs(alone).max())


def test_names_of_implementations():
    assert attention.get("xla") is attention.xla
    assert attention.get("auto") is attention.auto
    with pytest.raises(ValueError, match="'nope' is not known: choose one of auto, xla"):
        attention.get("nope")
