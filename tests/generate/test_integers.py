"""Quantised directories: what becomes of their integers, and which kernel multiplies by them."""

import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import checkpoint
from qwen_jax.attention import deadline, timing, verdicts
from qwen_jax.checkpoint import adapter_files, store
from qwen_jax.generate import integer_products, integers
from qwen_jax.kernels import choice
from qwen_jax.leaves import grouped, grouped_calls
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weights import Weight
from qwen_jax.runtime import processes
from tests.generate.test_load_adapter import adapters_of
from tests.support.conversion import there
from tests.support.gptq import GPTQ
from tests.support.tiny import on_mesh


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


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dtype"), [(4, "bfloat16"), (8, "float32")])
def test_a_kernel_that_is_right(bits, dtype):
    assert integer_products.amiss("pallas_tpu", bits=bits, dtype=dtype) is None


def wrong(x, codes, **given):
    """As if the groups were one."""
    scales = given.pop("scales")
    scales = jnp.broadcast_to(scales[:1], scales.shape)
    return grouped_calls.KERNELS["pallas_tpu"](x, codes, scales=scales, **given)


def declining(*args, **given):
    raise NotImplementedError("not here\nand more")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (wrong, "with 1 rows and groups of 128 it is wrong by"),
        (declining, "NotImplementedError: not here"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(model, kernel, told, monkeypatch, caplog):
    monkeypatch.setitem(grouped_calls.KERNELS, "other", kernel)
    monkeypatch.setitem(integer_products.OF_PLATFORM, "cpu", "other")
    with caplog.at_level("INFO", "qwen_jax"):
        loaded = qwen_jax.load(model, dequantise=False)
    assert loaded.decoder.layers[0].attn.q.kernel is None
    (line,) = [line for line in caplog.messages if "bits" in line]
    assert told in line and "floats are made" in line


def test_a_kernel_may_decline_many_rows(monkeypatch):
    """As on a TPU v4. It is tested where no mesh is in force, which would divide its rows."""
    ran = []

    def few(x, codes, **given):
        ran.append((len(x), len(given["scales"]), given["zeros"] is not None))
        assert not jax.sharding.get_abstract_mesh().axis_names
        if len(x) > 64:
            raise NotImplementedError
        return grouped_calls.KERNELS["by_groups"](x, codes, **given)

    monkeypatch.setitem(grouped_calls.KERNELS, "few", few)
    monkeypatch.setitem(integer_products.OF_PLATFORM, "cpu", "few")
    with on_mesh(tp=2):
        assert integer_products.settled(4, "float32") == "few"
    assert ran == [(1, 8, False), (128, 8, False), (1, 32, True), (128, 32, True)]


class Chip(NamedTuple):
    """As if programs were compiled for it."""

    platform: str = "gpu"
    device_kind: str = "chip"


@pytest.mark.parametrize(
    ("own", "taken", "told"),
    [
        (0.001, True, "products with by_groups: it is right on this chip, and faster (1 ms"),
        (0.002, False, "floats are made for each product, and not by_groups: it is slower"),
    ],
)
def test_a_kernel_is_used_if_it_is_faster(own, taken, told, monkeypatch, caplog):
    monkeypatch.setattr(choice, "device", Chip)
    monkeypatch.setattr(integer_products, "_SIDE", 128)
    monkeypatch.setattr(integer_products, "_WEIGHTS", 2)
    called = []

    def medians(programs, rounds):
        results = [run() for run in programs.values()]
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        called.append(sorted(programs))
        return {"kernel": own, "floats": 0.002}

    monkeypatch.setattr(timing, "medians", medians)
    with caplog.at_level("INFO", "qwen_jax"):
        assert integer_products.settled(4, "float32") == ("by_groups" if taken else None)
    assert called == [["floats", "kernel"]] and told in caplog.text


def test_all_processes_take_a_kernel_or_none(monkeypatch, caplog):
    """One process on which it is wrong is enough, and so is one on which it is slow."""
    found = {"said": []}
    monkeypatch.setattr(processes, "gather", lambda _: map(json.dumps, found["said"]))
    for said, told in (
        ([(None,), ("it is wrong",)], "it is wrong, on this cpu (process 1)"),
        ([(None, 1.0, 2.0), (None, 3.0, 2.0)], "slower on this cpu (3e+03 ms, with floats 2e+03"),
        ([(None, 1.0, 2.0), (None, 2.0, 3.0)], None),
        ([(None,), None], "another process has no such device, on this cpu (process 1)"),
    ):
        found["said"] = [{"by_groups": x} if x else {} for x in said]
        taken = integer_products.settled(4, "float32")
        assert taken == ("by_groups" if told is None else None)
        assert told is None or told in caplog.messages[-1]


@pytest.mark.parametrize(
    ("hopper", "triton", "best"),
    [
        ((None, 1.0, 9.0, 3.0), (None, 1.0, 9.0, 4.0), "pallas_hopper"),
        ((None, 1.0, 9.0, 4.0), (None, 1.0, 9.0, 3.0), "pallas_triton"),
        (("it is wrong",), (None, 1.0, 9.0, 3.0), "pallas_triton"),
        (("it is wrong",), (None, 9.0, 1.0, 3.0), None),
    ],
)
def test_the_fastest_kernel_that_is_right_is_used(hopper, triton, best, monkeypatch, caplog):
    """On a Hopper GPU, where one row and many are timed with both kernels."""
    trials = {"pallas_hopper": hopper, "pallas_triton": triton}
    asked = []

    def tested(name, bits, dtype, alone):
        asked.append((name, alone))
        return integer_products.Trial(*trials[name])

    monkeypatch.setattr(integer_products, "_tested", tested)
    monkeypatch.setitem(integer_products.OF_PLATFORM, "cpu", "pallas_triton")
    monkeypatch.setattr(choice, "is_hopper", lambda _: True)
    with caplog.at_level("INFO", "qwen_jax"):
        assert integer_products.settled(4, "bfloat16") == best
    assert asked == [(name, False) for name in trials]
    used = f"products with {best}" if best else "floats are made for each product"
    assert len(caplog.messages) == 2
    assert all(used in line or f"{best} is used" in line for line in caplog.messages)
    assert caplog.text.count("it is wrong, on this cpu") == (len(hopper) == 1)
    assert caplog.text.count("; 256 rows 4e+03 ms)") == (len(hopper) > 1)


def test_a_kernel_that_ends_programs_is_not_tested_again(monkeypatch, caplog):
    """Nor does one that hangs hold up the program."""
    mark = integer_products._mark("by_groups", 4, dtype="float32")
    for dead in (2**30, 2**30 + 1):  # no such processes
        with monkeypatch.context() as patch:
            patch.setattr(verdicts.Path, "unlink", lambda _: None)  # its mark stays
            patch.setattr(verdicts.os, "getpid", lambda dead=dead: dead)
            with verdicts.begun(mark):
                pass
    assert integer_products.settled(4, "float32") is None
    assert "programs have died while it was tested" in caplog.text
    verdicts.forget()
    monkeypatch.setattr(deadline, "LIMIT", 0.01)
    monkeypatch.setattr(integer_products, "amiss", lambda *_, **__: time.sleep(0.3))
    assert integer_products.settled(4, "float32") is None
    assert "its test was not done after 0.01 s" in caplog.text


@pytest.mark.parametrize(
    "kernel", ["by_groups", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
def test_a_model_through_a_kernel(model, kernel, monkeypatch):
    """Logits of a prompt and of decoding are those without it."""
    tokens = np.arange(20)[None] * 7 % 512
    plain = qwen_jax.load(model, dequantise=True)
    monkeypatch.setitem(integer_products.OF_PLATFORM, "cpu", kernel)
    through = qwen_jax.load(model, dequantise=False)
    assert through.decoder.layers[0].attn.q.kernel == kernel
    expected = plain.logits(tokens)
    found = through.logits(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def rounded_head(tmp_path_factory):
    """The golden directory of 4 bits with a head in int8."""
    path = tmp_path_factory.mktemp("integers") / "model"
    there(GPTQ / "int4", path, "--head", "int8")
    return path


@pytest.mark.parametrize("own_head", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_adapter_where_the_head_is_int8(rounded_head, own_head, tmp_path):
    """An adapter's own head, if it has one, takes the place of the one in int8."""
    with on_mesh():
        config = checkpoint.load_config(rounded_head)
        adapter_files.write(tmp_path / "adapter", adapters_of(config, embeddings=own_head))
    tokens = np.arange(20)[None] * 7 % 512
    kept, floats = (
        qwen_jax.load(rounded_head, adapter=tmp_path / "adapter", dequantise=dequantise)
        for dequantise in (False, True)
    )
    assert isinstance(kept.decoder.head, Weight if own_head else Int8)
    expected = floats.logits(tokens)
    most = np.abs(expected).max()
    np.testing.assert_allclose(kept.logits(tokens), expected, rtol=0, atol=1e-5 * most)


@pytest.mark.parametrize("dequantise", [False, True])
def test_a_mesh_that_cuts_words_is_refused_before_weights_are_read(model, dequantise, monkeypatch):
    """Whether or not integers would become floats, as they are read in words."""

    def cuts(*_, **__):
        raise ValueError("words are cut")

    monkeypatch.setattr(grouped, "group_for", cuts)  # needs more devices than a test has
    monkeypatch.setattr(store, "restore", None)
    with (
        on_mesh(tp=2),
        pytest.raises(ValueError, match=r"^mesh tp=2: words are cut: choose a mesh"),
    ):
        qwen_jax.load(model, dequantise=dequantise)


def test_groups_that_a_mesh_cuts(model):
    """They are smaller there, and the model is the same."""
    tokens = np.arange(20)[None] * 7 % 512
    expected = qwen_jax.load(model, dequantise=True).logits(tokens)
    with on_mesh(tp=2):
        cut = qwen_jax.load(model, dequantise=False)
        assert cut.decoder.layers[0].ffn.down.group_size == 64
        assert cut.decoder.layers[0].ffn.up.group_size == 128
        found = cut.logits(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
