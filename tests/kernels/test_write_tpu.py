"""The kernels that write pages on TPUs, interpreted on the CPU, against numpy's assignment."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import write_tpu
from qwen_jax.leaves.int8 import Int8
from tests.support.tiny import QUICK

TABLE = np.array([5, 0, 2, 0])  # two tokens have no place


def pool(kind: str, size: int = 64) -> tuple[Any, np.ndarray]:
    """A leaf [7, 2, 3, size, 32] and as many numbers of its kind: values, and scales if int8."""
    random = np.random.default_rng(0)
    shape = (2, 7, 2, 3, size, 32)
    if kind != "int8":
        old, new = jnp.asarray(random.standard_normal(shape), kind)
        return old, new
    old, new = jnp.asarray(random.integers(-127, 128, shape), jnp.int8)
    scales = jnp.asarray(random.uniform(1, 2, shape[:-1]), jnp.float32)
    return Int8(old, scales[0]), Int8(new, scales[1])


@pytest.mark.parametrize(("kind", "whole"), [("bfloat16", False), ("int8", False), ("int8", True)])
def test_writes_what_it_is_told_and_nothing_else(kind: str, whole: bool) -> None:
    old, new = pool(kind)
    slots = np.array([0, 7, 63, 40])
    new = jax.tree.map(lambda x: x[: len(TABLE)] if whole else x[: len(TABLE), :, :, 0], new)
    write = jax.jit(write_tpu.tpu_write, compiler_options=QUICK)
    found = write(old, new, jnp.asarray(TABLE), None if whole else jnp.asarray(slots))
    for x, before, given in zip(*map(jax.tree.leaves, (found, old, new)), strict=True):
        expected = np.array(before)
        for i, page in enumerate(TABLE):
            if whole:
                expected[page] = given[i]
            else:
                expected[page, :, :, slots[i]] = given[i]
        np.testing.assert_array_equal(np.asarray(x)[1:], expected[1:])


def test_declines_pages_of_less_than_a_register() -> None:
    old, new = pool("bfloat16", size=24)
    with pytest.raises(NotImplementedError, match=r"write_tpu: pages of 24 .* multiples of 16"):
        write_tpu.tpu_write(old, new, jnp.arange(7))
