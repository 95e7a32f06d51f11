"""Leaves of eight bits: how near they are, how they multiply, and adapters on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax.attention import xla
from qwen_jax.leaves import int8, weights
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weights import Weight, map_leaves, named_leaves
from qwen_jax.meshes.moves import place
from qwen_jax.model import lora
from tests.leaves.test_lora import drawn
from tests.support.tiny import QUICK, on_mesh, tiny_decoder
from tests.train.step.test_step import CONFIG, packed_batch
from train import step
from train.data import batches
from train.step import loss as losses


def dense(leaf: Int8) -> Weight:
    """What a leaf stands for."""
    values = leaf.values[...].astype(jnp.float32) * leaf.scale[...].astype(jnp.float32)[..., None]
    return Weight(values, letters=leaf.letters)


def test_values_are_the_nearest():
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((40, 96), np.float32) * np.geomspace(1e-4, 1e3, 40)[:, None]
    whole[3] = 0
    with on_mesh():
        leaf = int8.quantize_weight(Weight(jnp.asarray(whole, jnp.float32), letters="QD"))
        assert leaf.values.dtype == jnp.int8 and leaf.scale.dtype == jnp.bfloat16
        assert leaf.letters == "QD" and leaf.scale.letters == "Q"
        largest = np.abs(whole).max(axis=1, keepdims=True)
        # Half a unit, and what a scale of bfloat16 may cut off of the largest.
        assert np.all(np.abs(dense(leaf)[...] - whole) <= largest / 127 * 0.51)
        assert not np.any(np.asarray(dense(leaf)[3]))


def test_a_product_is_that_of_what_it_stands_for():
    rng = np.random.default_rng(1)
    with on_mesh():
        leaf = int8.quantize_weight(
            Weight(jnp.asarray(rng.standard_normal((24, 32))), letters="FD")
        )
        x = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.float32)
        expected = weights.contract("BTD,FD->BTF", x, weight=dense(leaf))
        np.testing.assert_allclose(
            weights.contract("BTD,FD->BTF", x, weight=leaf), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "sequence"),
    [
        ({}, False),
        ({"data": 2, "fsdp": 2, "tp": 2}, False),
        ({"fsdp": 2, "context": 2, "tp": 2}, True),
        ({"tp": 8}, True),
    ],
)
def test_adapters_on_eight_bits(sizes, sequence):
    """Loss and gradients on a mesh are those of the dense weights that they stand for."""

    def of(adapters: Any, decoder: Any, batch: Any) -> Any:
        made = lora.attach(decoder, adapters)
        return losses.loss(
            made,
            batch,
            attend=xla,
            dtype=jnp.float32,
            remat=step.REMAT["full"],
            sequence_parallel=sequence,
        )[0]

    with on_mesh(**sizes):
        decoder = step.stacked(map_leaves(int8.of_layers, tiny_decoder(CONFIG)))
        kinds = {name: type(leaf) for name, leaf in named_leaves(decoder).items()}
        assert kinds["layers.attn.q"] is kinds["layers.ffn.down"] is Int8
        assert kinds["embedding"] is kinds["layers.attn_norm"] is Weight
        stands = map_leaves(lambda _, x: dense(x) if isinstance(x, Int8) else x, decoder)
        adapters, batch = drawn(), batches.place(packed_batch())
        grad = jax.jit(jax.value_and_grad(of), compiler_options=QUICK)
        value, gradients = grad(adapters, decoder, batch)
        expected, exact = grad(adapters, stands, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, leaf in named_leaves(exact).items():
        most = np.abs(leaf[...]).max()
        got = named_leaves(gradients)[name][...]
        np.testing.assert_allclose(got, leaf[...], rtol=0, atol=2e-5 * most, err_msg=name)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}], ids=["one device", "parts of a sum"])
def test_float16_does_not_overflow_before_it_is_scaled(sizes):
    """Unscaled, the sum of whole numbers would be 520192."""
    with on_mesh(**sizes):
        held = place(np.full((4, 4096), 0.01, np.float32), "DF")
        leaf = int8.quantize_weight(Weight(held, letters="DF"))
        x = place(np.ones((1, 2, 4096), np.float16), "BTF")

        def of(x: jax.Array) -> jax.Array:
            return weights.contract("BTF,DF->BTD", x, weight=leaf, out=P(None, None, None))

        y, back = jax.vjp(of, x)
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(y, 40.96, rtol=4e-3)
        (dx,) = back(jnp.ones_like(y))
        assert dx.dtype == jnp.float16
        np.testing.assert_allclose(dx, 0.04, rtol=4e-3)
