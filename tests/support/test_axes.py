"""Axes of array arguments and results are checked while tests run."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from qwen_jax.attention import Mask
from qwen_jax.kernels import flash_tpu
from qwen_jax.leaves.weights import contract
from qwen_jax.model import rope
from tests.support import axes
from tests.support.tiny import tiny_config
from train.data import packing
from train.data.batch import Batch


def test_an_array_of_other_axes_is_refused():
    scheme = rope.from_config(tiny_config())
    with pytest.raises(TypeError, match=r"rotary: positions is"):
        rope.rotary(scheme, jnp.arange(3), frequencies=jnp.ones((1, 8)))
    with pytest.raises(TypeError, match=r"rotary: frequencies is"):
        rope.rotary(scheme, jnp.ones((3, 5), jnp.int32), frequencies=jnp.ones((2, 8)))
    with pytest.raises(TypeError, match=r"joined: lengths is"):
        packing.joined(np.ones((2, 3), np.int64), 4)
    with pytest.raises(TypeError, match=r"Batch.__init__: weights is"):
        Batch(*np.ones((4, 2, 3), np.int32), np.ones((2, 4), np.float32))
    with pytest.raises(TypeError, match=r"contract: x is"):
        contract("BTD,FD->BTF", jnp.ones((1, 2, 3), jnp.int32), weight=None)
    with pytest.raises(TypeError, match=r"tpu_attention: q is"):
        flash_tpu.tpu_attention(jnp.ones((1, 8, 32)), None, None, None, jnp.float32(1))


def test_a_field_of_other_axes_is_refused():
    ids = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(TypeError, match=r"Mask.__init__: q_segments is"):
        Mask(ids, ids, ids[0], ids, jnp.int32(1))


def test_a_result_of_other_axes_is_refused():
    @axes.checked
    def halves(
        x: Float[Array, "B T"], y: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, " B"] | None]:
        return x, y if y.sum() else y[:, 0]

    ones = jnp.ones((2, 3))
    assert halves(ones, 0 * ones)[1].shape == (2,)
    with pytest.raises(TypeError, match=r"halves: the result is"):
        halves(ones, ones)


def test_an_axis_may_be_as_long_as_an_argument_says():
    @axes.checked
    def ones(given: int, rows: int = 2) -> Float[np.ndarray, " {rows}"]:
        return np.ones(given)

    assert ones(2).shape == (2,) and ones(3, 3).shape == ones(3, rows=3).shape == (3,)
    with pytest.raises(TypeError, match=r"ones: the result is float64\[2\]"):
        ones(2, rows=3)
