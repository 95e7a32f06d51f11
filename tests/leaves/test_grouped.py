"""Weights of 4 and 8 bits in groups: packing, products on any mesh, gradients, adapters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec as P

from qwen_jax import model
from qwen_jax.leaves import grouped
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Weight, contract
from qwen_jax.meshes import gathering
from qwen_jax.meshes.moves import place
from tests.support import integers
from tests.support.tiny import full_logits, on_mesh, tiny_config, tiny_decoder, tiny_tokens

SMALL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 8, "vocab_size": 72}
CONFIG = tiny_config(**SMALL, num_heads=8, num_kv_heads=8)
MESHES: list[dict[str, int]] = [
    *({"tp": 2}, {"tp": 4}, {"tp": 8}, {"fsdp": 2}),
    *({"fsdp": 8}, {"fsdp": 2, "tp": 2}, {"data": 2, "fsdp": 2, "tp": 2}),
]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_successive_inputs_from_the_lowest_bits_on(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (64, 5)).astype(np.uint8)
    words = grouped.pack(codes, bits)
    assert words.shape == (64 * bits // 32, 5) and words.dtype == np.uint32
    for row in range(64):
        word, place_ = divmod(row, 32 // bits)
        assert np.array_equal((words[word] >> (bits * place_)) % 2**bits, codes[row])
    assert np.array_equal(grouped.unpack(words, bits), codes)
    assert np.array_equal(grouped.unpack(jnp.asarray(words), bits), codes)


def elements(leaf: Grouped, zeros: int) -> np.ndarray:
    """The weight [out, in] that a leaf stands for, element by element in float64."""
    codes = grouped.unpack(np.asarray(leaf.codes[...]), leaf.bits).astype(np.float64)
    scales = np.asarray(leaf.scales[...]).astype(np.float64)
    middle = np.full(scales.shape, zeros) if leaf.zeros is None else np.asarray(leaf.zeros[...])
    size = len(codes) // len(scales)
    found = np.empty_like(codes)
    order = np.arange(len(codes)) if leaf.order is None else np.asarray(leaf.order[...])
    for row, channel in enumerate(order):
        found[channel] = (codes[row] - middle[row // size]) * scales[row // size]
    return found.T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_is_that_of_what_it_stands_for(bits, act, symmetric):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((24, 64)).astype(np.float32)
    order = rng.permutation(64) if act else None
    form = {"bits": bits, "group": 16, "symmetric": symmetric, "order": order}
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    with on_mesh():
        leaf = integers.of(weight, "FD", **form)
        assert leaf.letters == "FD" and leaf.shape == (24, 64) and leaf.group_size == 16
        whole = elements(leaf, 2 ** (bits - 1))
        assert np.abs(whole - weight).max() < 0.3 / 2 ** (bits - 4)
        got = contract("BTD,FD->BTF", jnp.asarray(x), weight=leaf)
        np.testing.assert_allclose(got, x @ whole.T, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(grouped.plain(leaf, "float32")[...], np.float32(whole))
        gradient = jax.grad(lambda x: contract("BTD,FD->BTF", x, weight=leaf).sum())(jnp.asarray(x))
        wanted = np.broadcast_to(whole.sum(0), x.shape)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "parts", "bits", "size"),
    [
        (11008, 1, 4, 128),
        *((11008, 2, 4, 128), (11008, 4, 4, 64), (11008, 8, 4, 32)),
        *((13696, 2, 4, 64), (13696, 4, 4, 32), (13696, 8, 4, 16)),
        *((5504, 2, 4, 64), (5504, 4, 4, 32), (5504, 8, 4, 16), (5504, 8, 8, 16)),
        (24576, 64, 4, 128),
    ],
)
def test_groups_that_shards_do_not_cut(inputs, parts, bits, size):
    assert grouped.group_for(inputs, group_size=128, parts=parts, bits=bits) == size


def test_words_that_shards_would_cut_are_refused():
    with pytest.raises(ValueError, match="5504 inputs of 4 bits cannot be divided among 64"):
        grouped.group_for(5504, group_size=128, parts=64, bits=4)


@functools.cache
def logits(
    sizes: tuple[tuple[str, int], ...],
    bits: int,
    stacked: bool,
    kernel: str | None = None,
    rows: int = 8,
    group: int = 8,
) -> np.ndarray:
    tokens = tiny_tokens(rows, 6)
    with on_mesh(**dict(sizes)):
        decoder = integers.decoder_of(tiny_decoder(CONFIG), bits=bits, group=group, kernel=kernel)
        assert isinstance(decoder.layers[0].attn.o, Grouped)
        decoder = model.stack(decoder) if stacked else decoder
        return np.asarray(full_logits(decoder, tokens))


@pytest.mark.parametrize(
    ("sizes", "stacked"),
    [
        *((sizes, False) for sizes in MESHES),
        ({"fsdp": 2, "tp": 2}, True),
        *(pytest.param(sizes, True, marks=pytest.mark.slow) for sizes in MESHES),
    ],
    ids=str,
)
def test_a_decoder_on_any_mesh(sizes, stacked):
    expected = logits((), 4, False)
    found = logits(tuple(sizes.items()), 4, stacked)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"fsdp": 2, "tp": 2}], ids=str)
def test_a_decoder_through_a_kernel(sizes, bits, monkeypatch):
    """Which declines none of its products."""
    monkeypatch.setattr(grouped, "_say_once", pytest.fail)
    how = {"rows": 2, "group": 32}
    expected = logits((), bits, False, **how)
    found = logits(tuple(sizes.items()), bits, False, "pallas_tpu", **how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_a_kernel_declines_is_computed_without_it(caplog):
    """And said once."""
    grouped._say_once.cache_clear()
    x = np.random.default_rng(4).standard_normal((65, 2, 64)).astype(np.float32)
    weight = np.random.default_rng(5).standard_normal((48, 64)).astype(np.float32)
    with on_mesh(), caplog.at_level("INFO", "qwen_jax"):
        leaf = integers.of(weight, "FD", bits=4, group=16)
        found = [
            np.asarray(contract("BTD,FD->BTF", jnp.asarray(x), weight=each))
            for each in (leaf, *[grouped.for_kernel(leaf, "pallas_tpu")] * 2)
        ]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    (line,) = caplog.messages
    assert "groups of 16 inputs" in line and "make floats of their weights" in line


def test_words_of_a_tpu_kernel_lie_outputs_last():
    """Also where they came otherwise, as XLA lays out some on TPUs; nothing lays them out again."""
    x = np.random.default_rng(6).standard_normal((3, 1, 64)).astype(np.float32)
    weight = np.random.default_rng(7).standard_normal((48, 64)).astype(np.float32)
    with on_mesh(tp=2):
        leaf = integers.of(weight, "FD", bits=4, group=16)
        words = leaf.codes[...]
        turned = jax.device_put(words, Format(Layout(major_to_minor=(1, 0)), words.sharding))
        leaf = dataclasses.replace(leaf, codes=Weight(turned, letters=leaf.codes.letters))
        made = grouped.for_kernel(leaf, "pallas_tpu")
        assert leaf.codes[...].format.layout.major_to_minor == (1, 0)
        assert made.codes[...].format.layout.major_to_minor == (0, 1)
        assert made.codes[...].sharding == words.sharding
        run = jax.jit(lambda x, leaf: contract("BTD,FD->BTF", x, weight=leaf))
        np.testing.assert_allclose(run(x, made), run(x, leaf), rtol=0, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_through_a_kernel(symmetric):
    """On two devices of `tp`, where the inputs are divided, and where the outputs are."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    for letters, out in (("FD", None), ("DF", P(None, None, None))):
        weight = rng.standard_normal((48, 64)).astype(np.float32)
        equation = f"BT{letters[1]},{letters}->BT{letters[0]}"
        results = []
        for kernel, sizes in ((None, {}), ("pallas_tpu", {}), ("pallas_tpu", {"tp": 2})):
            with on_mesh(**sizes):
                form = {"bits": 4, "group": 16, "symmetric": symmetric}
                leaf = integers.of(weight, letters, **form)
                leaf = leaf if kernel is None else grouped.for_kernel(leaf, kernel)

                def loss(x: Any, leaf: Any, equation: str = equation, out: Any = out) -> Any:
                    return jnp.sum(contract(equation, x, weight=leaf, out=out) ** 2)

                placed = place(x, f"BT{letters[1]}")
                results.append(jax.jit(jax.value_and_grad(loss))(placed, leaf))
        (value, gradient), *others = results
        for other, of_x in others:
            np.testing.assert_allclose(other, value, rtol=1e-5)
            most = np.abs(gradient).max()
            np.testing.assert_allclose(of_x, gradient, rtol=0, atol=1e-5 * most)


def test_scales_are_not_rounded_to_bfloat16():
    """A pass in bfloat16 gathers float16 scales as they are."""
    scales = np.float16(np.linspace(0.001, 0.002, 64).reshape(8, 8))
    with on_mesh(fsdp=2):
        weight = Weight(place(scales, "DF"), letters="DF")
        gathered = jax.jit(lambda w: gathering.unshard(w, jnp.bfloat16))(weight)[...]
    assert gathered.dtype == jnp.float16
    np.testing.assert_array_equal(gathered, scales)


SIZES = {"1.8b": (2048, 5504), "7b": (4096, 11008), "14b": (5120, 13696), "72b": (8192, 24576)}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 4}, {"tp": 8}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_products_of_the_published_sizes(name, sizes):
    """One layer's products, on one device and on a mesh, where groups are cut smaller.

    Of the two largest, an eighth of the outputs.
    """
    width, wide = SIZES[name]
    shapes = {"FD": (wide, width), "DF": (width, wide), "QD": (width, width), "DQ": (width, width)}
    rng = np.random.default_rng(0)
    for letters, (outputs, inputs) in shapes.items():
        outputs //= 8 if name in ("14b", "72b") else 1
        words = rng.integers(0, 2**32, (inputs // 8, outputs), np.uint32)
        scales = rng.uniform(0.001, 0.01, (inputs // 128, outputs)).astype(np.float16)
        x = rng.standard_normal((8, 1, inputs)).astype(np.float32)
        results = []
        for axes in ({}, sizes):
            with on_mesh(**axes):
                results.append(product(letters, words, scales, x, parts=_parts(letters, axes)))
        one, many = results
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_act_order_of_eight_bits_at_the_published_sizes(name):
    """With few outputs, as a mesh cuts groups and the order of inputs along the inputs alone."""
    width, wide = SIZES[name]
    rng, outputs = np.random.default_rng(1), 64
    for letters, inputs in {"FD": width, "DF": wide, "DQ": width}.items():
        words = rng.integers(0, 2**32, (inputs // 4, outputs), np.uint32)
        scales = rng.uniform(0.001, 0.01, (inputs // 128, outputs)).astype(np.float16)
        order = rng.permutation(inputs).astype(np.int32)
        x = rng.standard_normal((8, 1, inputs)).astype(np.float32)
        weight = grouped.unpack(words, 8).astype(np.float64) - 128
        weight *= np.repeat(scales.astype(np.float64), 128, axis=0)
        exact = x[:, :, order] @ weight
        for axes in ({}, {"tp": 8}, {"fsdp": 8}):
            with on_mesh(**axes):
                parts = _parts(letters, axes)
                found = product(letters, words, scales, x, parts=parts, bits=8, order=order)
            np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def _parts(letters: str, sizes: dict[str, int]) -> int:
    """Among how many devices a mesh divides the inputs of a weight."""
    return sizes.get("fsdp" if letters[1] == "D" else "tp", 1)


def product(
    letters: str,
    words: np.ndarray,
    scales: np.ndarray,
    x: np.ndarray,
    *,
    parts: int,
    bits: int = 4,
    order: np.ndarray | None = None,
) -> np.ndarray:
    inputs, inward = x.shape[-1], letters[::-1]
    size = grouped.group_for(inputs, group_size=128, parts=parts, bits=bits)
    scales = np.repeat(scales, 128 // size, axis=0)
    leaf = Grouped(
        codes=Weight(place(words, inward), letters=inward),
        scales=Weight(place(scales, inward), letters=inward),
        zeros=None,
        order=None if order is None else Weight(place(order, "I"), letters="I"),
        bits=bits,
    )
    outputs, contracted = letters
    split = contracted in "FQ"

    @jax.jit
    def run(x: jax.Array, leaf: Any) -> jax.Array:
        whole = gathering.unshard(leaf, x.dtype)
        equation = f"BT{contracted},{letters}->BT{outputs}"
        return contract(equation, x, weight=whole, out=P(None, None, None) if split else None)

    return np.asarray(run(place(x, f"BT{contracted}"), leaf))
