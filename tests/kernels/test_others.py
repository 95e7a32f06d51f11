"""Other implementations, where a CPU can run them, against the reference in float32."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen_jax import attention
from qwen_jax.attention import FULL, Mask
from qwen_jax.kernels import others
from tests.kernels.test_flash import TOLERANCE, Shape, draw

pytestmark = pytest.mark.slow

SHAPES = [Shape(40, 60, 4, 2, 128, "float32"), Shape(50, 50, 2, 1, 128, "bfloat16")]
WITH_LSE = ("dot_product", "splash")


@pytest.fixture(params=others.ATTEND)
def name(request: pytest.FixtureRequest) -> Any:
    """Each implementation that is installed; jax's flash attention is interpreted throughout."""
    if request.param == "tokamax":
        pytest.importorskip("tokamax")
    forced = request.param == "flash"
    with pltpu.force_tpu_interpret_mode() if forced else contextlib.nullcontext():
        yield request.param


def close(got: Any, wanted: Any, dtype: str) -> None:
    got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
    assert np.isfinite(got).all()
    # Gradients of a softmax over one key are 0, and rounding is all that there is.
    assert np.abs(got - wanted).max() <= TOLERANCE[dtype] * max(1, np.abs(wanted).max())


@functools.partial(jax.jit, static_argnums=0)
def gradients(attend: Any, q: Any, k: Any, v: Any, mask: Mask, scale: Any, do: Any) -> Any:
    o, pull = jax.vjp(lambda *x: attend(*x, mask, scale), q, k, v)
    return o, *pull(do.astype(o.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(name: str, shape: Shape):
    for seed in (3, 4, 8, 11):  # LogN, windows, packing, rings and rows that see nothing
        (q, k, v, scale, do, _), mask = draw(shape, seed)
        mask = jax.tree.map(jnp.asarray, mask)
        wanted = gradients(attention.xla, q, k, v, mask, scale, do)
        half = (jnp.asarray(x, shape.dtype) for x in (q, k, v))
        got = gradients(others.ATTEND[name], *half, mask, scale, do)
        for x, y in zip(got, wanted, strict=True):
            close(x, y, shape.dtype)
        nothing = ~np.asarray(mask.visible()).any(-1)
        np.testing.assert_array_equal(np.asarray(got[0], np.float32)[nothing], 0)


def test_log_sum_exp_or_declined(name: str):
    (q, k, v, scale, *_), mask = draw(SHAPES[1], 4)
    mask = jax.tree.map(jnp.asarray, mask)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    if name not in WITH_LSE:
        with pytest.raises(NotImplementedError, match=f"{name}: the log-sum-exp"):
            others.ATTEND[name](*half, mask, scale, return_lse=True)
        return
    o, lse = jax.jit(functools.partial(others.ATTEND[name], return_lse=True))(*half, mask, scale)
    wanted, wanted_lse = attention.xla(q, k, v, mask, scale, return_lse=True)
    nothing = np.isneginf(wanted_lse)
    assert o.dtype == lse.dtype == jnp.float32
    close(o, wanted, "bfloat16")
    np.testing.assert_array_equal(np.isneginf(lse), nothing)
    close(lse[~nothing], wanted_lse[~nothing], "bfloat16")


def test_plain_causal(name: str):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 130, 2, 128))
    ids = jnp.tile(jnp.arange(130, dtype=jnp.int32), (2, 1))
    ones = jnp.ones_like(ids)
    mask = Mask(ids, ids, ones, ones, jnp.int32(FULL))
    got = jax.jit(others.CAUSAL[name])(q, k, v)
    close(got, attention.xla(q, k, v, mask, jnp.float32(128**-0.5)), "float32")


@pytest.mark.parametrize("cached", others.CACHED)
def test_a_cache_in_a_layout_of_its_own(cached: str):
    q = jax.random.normal(jax.random.key(0), (2, 1, 4, 128))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 2, 300, 128))
    length = jnp.array([300, 170], jnp.int32)
    slots = jnp.tile(jnp.arange(300, dtype=jnp.int32), (2, 1))
    written = (slots < length[:, None]).astype(jnp.int32)
    last, ones = length[:, None], jnp.ones((2, 1), jnp.int32)
    mask = Mask(last, slots, ones, written, jnp.int32(FULL))
    layout, attend = others.CACHED[cached]
    got = jax.jit(attend)(q, layout(k), layout(v), length)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    wanted = attention.xla(q, k, v, mask, jnp.float32(128**-0.5))
    close(got, wanted, "bfloat16")  # jax's paged attention rounds on the way


def test_what_it_does_not_do_is_declined(name: str):
    q, k = (jnp.ones((1, 8, heads, 64), jnp.float8_e5m2) for heads in (4, 3))
    ids = jnp.ones((1, 8), jnp.int32)
    mask = Mask(ids, ids, ids, ids, jnp.int32(FULL))
    with pytest.raises(NotImplementedError, match=f"{name}: dtype float8_e5m2"):
        others.ATTEND[name](q, k, k, mask, jnp.float32(1))
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    with pytest.raises(NotImplementedError, match=f"{name}: 4 query heads over 3"):
        others.ATTEND[name](q, k, k, mask, jnp.float32(1))
