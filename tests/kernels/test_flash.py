"""Flash kernels, interpreted, against the reference in float32, over drawn cases."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.attention import FULL, IMPLEMENTATIONS, Mask
from tests.support.tiny import KERNELS, QUICK

every_kernel = pytest.mark.parametrize("name", KERNELS)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
DRAWS = 15


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for; the masks and scales of a draw are data."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    batch: int = 2

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))


SHAPES = [
    Shape(130, 130, 4, 2, 32, "float32"),
    Shape(300, 300, 2, 2, 64, "float32", 1),
    Shape(70, 333, 2, 1, 128, "float32"),
    Shape(64, 200, 3, 1, 80, "float32"),
    Shape(257, 257, 2, 2, 96, "float32", 1),
    Shape(150, 150, 2, 1, 256, "float32"),
    Shape(1, 400, 4, 2, 64, "float32", 3),
    Shape(530, 530, 1, 1, 32, "float32", 1),
    Shape(190, 190, 2, 2, 128, "bfloat16"),
    Shape(129, 290, 4, 1, 64, "bfloat16", 1),
    Shape(200, 200, 2, 2, 80, "bfloat16", 1),
    Shape(140, 140, 2, 1, 96, "bfloat16"),
    Shape(100, 260, 2, 1, 128, "float16"),
    Shape(135, 135, 2, 2, 256, "bfloat16", 1),
]


def draw(shape: Shape, seed: int) -> tuple[list[np.ndarray], Mask]:
    """q, k, v, scale, cotangents of o and lse; and a mask: each feature by the toss of a coin."""
    rng = np.random.default_rng(seed)
    batch, queries, keys = shape.batch, shape.queries, shape.keys

    def normal(*sizes: int) -> np.ndarray:
        x = rng.standard_normal(sizes).astype(np.float32)
        return x.astype(jnp.dtype(shape.dtype)).astype(np.float32)

    wide, narrow = (queries, shape.heads), (keys, shape.kv_heads)
    scale = np.full((batch, queries), shape.head_dim**-0.5, np.float32)
    if rng.random() < 0.5:  # LogN, or a temperature
        scale *= rng.uniform(1, 1.7, scale.shape).astype(np.float32)
    arrays = [
        normal(batch, *wide, shape.head_dim),
        normal(batch, *narrow, shape.head_dim),
        normal(batch, *narrow, shape.head_dim),
        scale,
        normal(batch, *wide, shape.head_dim),
        rng.standard_normal((batch, *wide)).astype(np.float32),
    ]
    k_positions = np.tile(np.arange(keys, dtype=np.int32), (batch, 1))
    k_segments = np.ones((batch, keys), np.int32)
    if rng.random() < 0.4:  # packed sequences
        for row in range(batch):
            cuts = np.sort(rng.integers(0, keys, rng.integers(1, 4)))
            for cut in cuts:
                k_segments[row, cut:] += 1
                k_positions[row, cut:] = np.arange(keys - cut)
    if rng.random() < 0.4:  # left padding, up to all of a row
        for row in range(batch):
            k_segments[row, : rng.integers(0, keys + 1)] = 0
        if rng.random() < 0.2:
            k_segments[-1] = 0
    offset = keys - queries  # the last tokens ask
    q_positions, q_segments = k_positions[:, offset:].copy(), k_segments[:, offset:].copy()
    if rng.random() < 0.3:  # a ring: the keys' order is another, and some slots are empty
        turns = rng.integers(0, keys, batch)
        k_segments[:, : rng.integers(0, keys)] *= rng.integers(0, 2)
        for row, turn in enumerate(turns):
            k_positions[row] = np.roll(k_positions[row], turn)
            k_segments[row] = np.roll(k_segments[row], turn)
    window = int(rng.choice([FULL, FULL, 1, 7, 50, 128]))
    return arrays, Mask(q_positions, k_positions, q_segments, k_segments, np.int32(window))


@functools.partial(jax.jit, static_argnames=("name", "dtype"), compiler_options=QUICK)
def run(name: str, arrays: Any, mask: Mask, dtype: str) -> dict[str, jax.Array]:
    """o, lse and the gradients, through both results."""
    q, k, v, scale, do, dlse = arrays

    def attend(q: Any, k: Any, v: Any, scale: Any) -> Any:
        return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse=True)

    q, k, v = (x.astype(dtype) for x in (q, k, v))
    (o, lse), pull = jax.vjp(attend, q, k, v, scale)
    dq, dk, dv, dscale = pull((do, jnp.where(lse > -jnp.inf, dlse, 0)))
    names = ("o", "lse", "dq", "dk", "dv", "dscale")
    return dict(zip(names, (o, lse, dq, dk, dv, dscale), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_kernel
def test_agrees_with_the_reference(name: str, shape: Shape):
    for seed in range(DRAWS):
        arrays, mask = draw(shape, seed)
        expected = run("xla", arrays, mask, "float32")
        actual = run(name, arrays, mask, shape.dtype)
        nothing = np.isneginf(expected["lse"]).all(-1)
        if shape.dtype != "float32":
            del expected["dscale"]  # a sum that cancels; nothing learns it in half precision
        for key, wanted in expected.items():
            got, wanted = (np.asarray(x, np.float32) for x in (actual[key], wanted))
            if key == "lse":
                np.testing.assert_array_equal(got[nothing], -np.inf)
                got, wanted = got[~nothing], wanted[~nothing]
            assert np.isfinite(got).all(), (seed, key)
            largest = np.abs(wanted).max(initial=0)
            worst = np.abs(got - wanted).max(initial=0)
            assert worst <= TOLERANCE[shape.dtype] * largest, (seed, key, worst / largest)
            if key in ("o", "dq", "dscale"):
                np.testing.assert_array_equal(got[nothing], 0)


def test_drawn_cases_are_many_and_have_every_feature():
    cases = [draw(shape, seed)[1] for shape in SHAPES for seed in range(DRAWS)]
    assert len(cases) >= 200
    windows = {int(case.window) for case in cases}
    padded = sum((case.k_segments == 0).any() for case in cases)
    packed = sum((case.k_segments > 1).any() for case in cases)
    empty = sum((case.k_segments == 0).all(1).any() for case in cases)
    turned = sum((np.diff(case.k_positions) < -1).any() for case in cases)
    assert len(windows) == 5 and min(padded, packed, turned) > 40 and empty > 10


@every_kernel
def test_blocks_that_no_query_sees_are_not_read(name: str):
    """Not even multiplied by 0: they hold NaN here."""
    places, ones = np.arange(600, dtype=np.int32)[None], np.ones((1, 600), np.int32)
    mask = Mask(places[:, 500:], places, ones[:, 500:], ones, np.int32(50))
    k = jnp.ones((1, 600, 1, 32)).at[:, :256].set(jnp.nan)
    o = IMPLEMENTATIONS[name](jnp.ones((1, 100, 2, 32)), k, k, mask, jnp.float32(1))
    np.testing.assert_allclose(o, 1, rtol=1e-5)


@every_kernel
def test_the_same_bits_twice(name: str):
    arrays, mask = draw(SHAPES[8], 3)
    first, second = (run(name, arrays, mask, "bfloat16") for _ in range(2))
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


@every_kernel
def test_through_scan_checkpoint_and_vmap(name: str):
    """Two layers with windows of their own, rematerialised, over examples of a mapped axis."""
    shape = Shape(40, 40, 2, 1, 32, "float32")
    (q, k, v, scale, *_), mask = draw(shape, 1)
    windows = jnp.array([5, FULL], jnp.int32)

    def loss(name: str, q: Any, k: Any, v: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, window: Any) -> Any:
            rows = dataclasses.replace(mask, window=window)
            return IMPLEMENTATIONS[name](x, k, v, rows, scale) + x, None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, q, windows)[0]))

    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    both = []
    for each in ("xla", name):
        gradient = jax.vmap(jax.grad(functools.partial(loss, each), (0, 1, 2)))
        both.append(jax.jit(gradient)(*stacked))
    for wanted, got in zip(*both, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads", "what"),
    [
        (jnp.float64, 64, 2, "float64"),
        (jnp.float8_e5m2, 64, 2, "float8_e5m2"),
        (jnp.float32, 48, 2, "head dim 48"),
        (jnp.float32, 64, 3, "4 query heads over 3 key heads"),
    ],
)
@every_kernel
def test_what_it_does_not_do_is_declined(name: str, dtype, head_dim, kv_heads, what):
    sizes = (1, 8, 4, head_dim), (1, 8, kv_heads, head_dim)
    q, k = (jax.ShapeDtypeStruct(size, dtype) for size in sizes)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    mask = Mask(ids, ids, ids, ids, jax.ShapeDtypeStruct((), jnp.int32))
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=f"{name}: .*{what}"):
        jax.eval_shape(IMPLEMENTATIONS[name], q, k, k, mask, jax.ShapeDtypeStruct((), jnp.float32))
