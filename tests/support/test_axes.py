"""Axes of array arguments are checked while tests run."""

import jax.numpy as jnp
import pytest

from qwen_jax.leaves.weights import contract
from qwen_jax.model import rope
from tests.support.tiny import tiny_config


def test_an_array_of_other_axes_is_refused():
    scheme = rope.from_config(tiny_config())
    with pytest.raises(TypeError, match=r"rotary[^$]*parameter 'positions'"):
        rope.rotary(scheme, jnp.arange(3), frequencies=jnp.ones((1, 8)))
    with pytest.raises(TypeError, match=r"rotary[^$]*parameter 'frequencies'"):
        rope.rotary(scheme, jnp.ones((3, 5), jnp.int32), frequencies=jnp.ones((2, 8)))
    with pytest.raises(TypeError, match=r"contract[^$]*parameter 'x'"):
        contract("BTD,FD->BTF", jnp.ones((1, 2, 3), jnp.int32), weight=None)
