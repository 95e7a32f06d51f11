"""The Hopper kernels: compiled for GPUs that are not there, and emulated where jax can."""

import importlib.util
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import attention
from qwen_jax.attention import FULL, Mask
from qwen_jax.kernels import flash, flash_hopper

SHARED = 227 * 1024  # bytes of shared memory that a thread block may have
compiles = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs the CUDA plugin (extra: aot)"
)
emulates = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax does not emulate Mosaic GPU"
)


def arguments(batch: int, queries: int, keys: int, heads: int, groups: int, dtype: str) -> Any:
    """Shapes of q, k, v, mask, scale."""
    places = {
        name: jax.ShapeDtypeStruct((batch, length), jnp.int32)
        for name, length in (
            ("q_positions", queries),
            ("k_positions", keys),
            ("q_segments", queries),
            ("k_segments", keys),
        )
    }
    return (
        jax.ShapeDtypeStruct((batch, queries, heads, 128), dtype),
        *[jax.ShapeDtypeStruct((batch, keys, heads // groups, 128), dtype)] * 2,
        Mask(**places, window=jax.ShapeDtypeStruct((), jnp.int32)),
        jax.ShapeDtypeStruct((batch, queries), jnp.float32),
    )


def gradients(q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
    def loss(q: Any, k: Any, v: Any, scale: Any) -> Any:
        return jnp.sum(flash_hopper.hopper_attention(q, k, v, mask, scale), dtype=jnp.float32)

    return jax.grad(loss, (0, 1, 2, 3))(q, k, v, scale)


@compiles
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2048, 2048, 16, 1, "bfloat16"),
        (2, 2000, 3001, 32, 8, "float16"),
        (1, 32768, 32768, 64, 8, "bfloat16"),
    ],
    ids=str,
)
def test_fits_the_registers_and_the_shared_memory(shape: Any) -> None:
    from benchmarks.aot import compile_gpu

    args = arguments(*shape)
    compiled, kernels = compile_gpu(gradients, args, "h200")
    kernels = [x for x in kernels if x.name.startswith("flash")]
    assert len(kernels) == 3
    assert all(x.spilled == 0 and x.shared <= SHARED for x in kernels), kernels
    q, k, *_ = args
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * (q.size + k.size)


@compiles
def test_float32_results_fit_too() -> None:
    from benchmarks.aot import compile_gpu

    def forward(*args: Any) -> Any:
        return flash_hopper.hopper_attention(*args, return_lse=True)

    _, kernels = compile_gpu(forward, arguments(1, 4096, 4096, 16, 2, "bfloat16"), "h200")
    (kernel,) = (x for x in kernels if x.name.startswith("flash"))
    assert kernel.spilled == 0
    assert kernel.shared <= SHARED


def test_declines_other_devices() -> None:
    args = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments(1, 8, 8, 2, 1, "bfloat16"))
    with pytest.raises(NotImplementedError, match="Hopper"):
        flash_hopper.hopper_attention(*args)


def _products(*pairs: Any, issued: Any = None) -> list[Any]:
    """The emulator knows neither sums in place nor bfloat16: the products are jax's here."""
    results = [jnp.dot(_read(a), _read(b)) for a, b in pairs]
    if issued is not None:
        issued()
    return results


def _accumulate(*parts: Any) -> list[Any]:
    return [sums + jnp.dot(_read(a), _read(b)) for sums, a, b in parts]


def _read(x: Any) -> Any:
    return x[...].astype(jnp.float32)


def draw(case: str) -> tuple[Any, ...]:
    """q, k, v, mask, scale, and cotangents of o and lse."""
    random = np.random.default_rng(0)
    batch, queries, keys, heads, kv_heads, window = {
        "window": (2, 260, 333, 2, 1, 50),
        "packed": (1, 300, 500, 2, 1, FULL),
        "ring": (1, 130, 700, 1, 1, FULL),
    }[case]
    place = np.tile(np.arange(keys), (batch, 1))
    segment = np.ones_like(place)
    if case == "window":  # padded on the left, the second row by more
        left = np.array([[37], [200]])
        place, segment = place - left, (place >= left).astype(int)
    if case == "packed":  # with a hole of a block, and padding behind
        segment = 1 + np.searchsorted([30, 210, 390], place)
        segment[:, 128:256] = segment[:, -20:] = 0
    q_place, q_segment = place[:, -queries:], segment[:, -queries:]
    if case == "ring":
        place = (place - keys // 3) % keys
        q_place = place[:, -queries:]

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    scale = jnp.asarray(random.uniform(0.8, 1.2, (batch, queries)) / 128**0.5, jnp.float32)
    mask = Mask(*(jnp.asarray(x, jnp.int32) for x in (q_place, place, q_segment, segment, window)))
    q, do = normal(batch, queries, heads, 128), normal(batch, queries, heads, 128)
    k, v = normal(batch, keys, kv_heads, 128), normal(batch, keys, kv_heads, 128)
    dlse = normal(batch, queries, heads).astype(jnp.float32)
    return q, k, v, mask, scale, do.astype(jnp.float32), dlse


@pytest.mark.slow
@emulates
@pytest.mark.parametrize("case", ["window", "packed", "ring"])
def test_emulated_agrees_with_the_reference(case: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(flash_hopper, "_products", _products)
    monkeypatch.setattr(flash_hopper, "_accumulate", _accumulate)
    body = flash_hopper.Hopper(interpret=plgpu.InterpretGPUParams())  # pyright: ignore
    q, k, v, mask, scale, do, dlse = draw(case)

    def ours(q: Any, k: Any, v: Any, scale: Any) -> Any:
        return flash.attend_through(body, q, k, v, mask, scale, True)

    def reference(q: Any, k: Any, v: Any, scale: Any) -> Any:
        return attention.xla(q, k, v, mask, scale, True)

    results, pull = jax.vjp(ours, q, k, v, scale)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_pull = jax.vjp(reference, *wide, scale)
    seen = np.isfinite(expected[1])
    np.testing.assert_array_equal(np.isfinite(results[1]), seen)
    assert not np.any(np.asarray(results[0])[~seen])
    cotangents = do, jnp.where(seen, dlse, 0)
    results = results[0], jnp.where(seen, results[1], 0), *pull(cotangents)
    expected = expected[0], jnp.where(seen, expected[1], 0), *expected_pull(cotangents)
    for x, y in zip(results, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.max(np.abs(x - y)) < 1e-2 * np.max(np.abs(y))
