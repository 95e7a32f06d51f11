"""Products with weights in groups in plain XLA, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import grouped_xla
from tests.kernels.grouped_cases import Case, check, draw, reference

CASES = [
    Case(1, 256, 384),
    Case(1, 176, 72, 16, bits=8, asymmetric=True),
    Case(1, 1376, 40, 32, dtype="float32", asymmetric=True, scales="float32"),
    Case(1, 256, 128, 256, bits=8, dtype="float16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case: Case) -> None:
    settings = {"bits": case.bits, "dtype": "float32"}
    check(jax.jit(functools.partial(grouped_xla.one_row, **settings)), case)
    check(jax.jit(functools.partial(grouped_xla.by_groups, **settings)), case)


def test_groups_of_many_rows() -> None:
    case = Case(9, 1376, 40, 32, asymmetric=True)
    check(functools.partial(grouped_xla.by_groups, bits=4, dtype="float32"), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_rows_agrees_with_float64(case: Case) -> None:
    """In float32; the weight is that of a product with the unit rows."""
    drawn = draw(case)
    x, codes = drawn.pop("x"), drawn.pop("codes")
    unit = {**drawn, "x": np.eye(case.inputs), "codes": codes}
    weight, _ = reference(case, unit)
    dy = np.random.default_rng(1).standard_normal((3, case.outputs)).astype(np.float32)
    run = jax.jit(functools.partial(grouped_xla.of_rows, bits=case.bits))
    found = np.asarray(run(jnp.asarray(dy), codes, **drawn), np.float64)
    assert found.shape == (3, x.shape[1])
    terms = np.abs(dy.astype(np.float64)) @ np.abs(weight).T
    assert np.max(np.abs(found - dy.astype(np.float64) @ weight.T) / terms) < 1e-6


def test_one_row_declines_two() -> None:
    with pytest.raises(NotImplementedError, match="one_row: 2 rows, only 1"):
        grouped_xla.one_row(**draw(Case(2, 256, 128)), bits=4)


@pytest.mark.parametrize("dtype", grouped_xla.PIECES)
def test_pieces_add_up_to_x(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 500)) * 2.0**-9, dtype)
    pieces = jax.jit(grouped_xla.pieces_of)(x)
    assert pieces.dtype == jnp.bfloat16
    total = np.asarray(pieces, np.float64).reshape(-1, *x.shape).sum(0)
    np.testing.assert_array_equal(total, np.asarray(x, np.float64))
