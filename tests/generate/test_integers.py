"""Quantised directories: what becomes of their integers, and which kernel multiplies by them."""

import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax.generate import integers
from qwen_jax.leaves import grouped_calls
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Weight
from tests.support.conversion import there
from tests.support.gptq import GPTQ


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("integers") / "model"
    there(GPTQ / "int4", path)
    return path


@pytest.mark.parametrize(
    ("share", "asked", "floats"),
    [(0.5, None, True), (0.0, None, False), (0.5, False, False), (0.0, True, True)],
)
def test_on_a_cpu_integers_become_floats_if_there_is_room(
    model, share, asked, floats, monkeypatch, caplog
):
    monkeypatch.setattr(integers, "_SHARE", share)
    with caplog.at_level("INFO", "qwen_jax"):
        loaded = qwen_jax.load(model, dequantise=asked)
    kind = Weight if floats else Grouped
    assert isinstance(loaded.decoder.layers[2].ffn.down, kind)
    said = [line for line in caplog.messages if "integers" in line]
    assert len(said) == (asked is None)
    if said:
        assert ("become float32" if floats else "are kept") in said[0]
        assert ("--no-dequantise" if floats else "--dequantise)") in said[0]


def test_floats_cannot_be_dequantised(tmp_path):
    there(GPTQ / "float16", tmp_path / "model")
    for asked in (True, False):
        with pytest.raises(ValueError, match=f"dequantise {asked}: .* is not quantised"):
            qwen_jax.load(tmp_path / "model", dequantise=asked)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, "bfloat16"), pytest.param(8, "float32", marks=pytest.mark.slow)]
)
def test_a_kernel_that_is_right(bits, dtype):
    assert integers.amiss("pallas_tpu", bits=bits, dtype=dtype) is None


def wrong(x, codes, **given):
    """As if the groups were one."""
    scales = jnp.broadcast_to(given.pop("scales")[:1], (8, codes.shape[1]))
    return grouped_calls.KERNELS["pallas_tpu"](x, codes, scales=scales, **given)


def declining(*args, **given):
    raise NotImplementedError("not here\nand more")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [(wrong, "1 rows it is wrong by"), (declining, "NotImplementedError: not here")],
)
def test_a_kernel_that_is_wrong_is_not_used(model, kernel, told, monkeypatch, caplog):
    monkeypatch.setitem(grouped_calls.KERNELS, "other", kernel)
    monkeypatch.setitem(integers.OF_PLATFORM, "cpu", "other")
    with caplog.at_level("INFO", "qwen_jax"):
        loaded = qwen_jax.load(model, dequantise=False)
    assert loaded.decoder.layers[0].attn.q.kernel is None
    (line,) = [line for line in caplog.messages if "bits" in line]
    assert told in line and "floats are made" in line


@pytest.mark.parametrize(
    "kernel", ["by_groups", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
def test_a_model_through_a_kernel(model, kernel, monkeypatch):
    """Logits of a prompt and of decoding are those without it."""
    tokens = np.arange(20)[None] * 7 % 512
    plain = qwen_jax.load(model, dequantise=True)
    monkeypatch.setitem(integers.OF_PLATFORM, "cpu", kernel)
    through = qwen_jax.load(model, dequantise=False)
    assert through.decoder.layers[0].attn.q.kernel == kernel
    expected = plain.logits(tokens)
    found = through.logits(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
