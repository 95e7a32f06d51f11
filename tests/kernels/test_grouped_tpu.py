"""Products with weights in groups for TPUs, interpreted on the CPU, against float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import grouped_tpu
from tests.kernels.grouped_cases import Case, check, draw
from tests.support.tiny import QUICK

# 1376 inputs are those of a 7B's `down` on eight devices, and its groups are of 32 there.
PARTS = [  # of words, for chips that convert no such integers
    Case(1, 256, 384),
    Case(3, 1376, 128, 32),
    Case(5, 304, 128, 16, dtype="float32", asymmetric=True, scales="float32"),
    Case(40, 192, 128, 64, dtype="float16"),
    Case(2, 176, 72, 176, asymmetric=True),
    Case(2, 384, 128, bits=8),
]
NATIVE = [
    Case(16, 384, 200),
    Case(2, 704, 128, 64, asymmetric=True),
    Case(8, 336, 128, 16, bits=8),
    Case(1, 512, 640, 256, bits=8, dtype="float32"),
    Case(3, 2304, 128, bits=8, dtype="float16", asymmetric=True),
]


@pytest.mark.parametrize(
    ("case", "native"),
    [(case, False) for case in PARTS] + [(case, True) for case in NATIVE],
    ids=str,
)
def test_agrees_with_float64(case: Case, native: bool) -> None:
    product = functools.partial(
        grouped_tpu.tpu_product, bits=case.bits, dtype="float32", native=native, interpret=True
    )
    check(jax.jit(product, compiler_options=QUICK), case)


@pytest.mark.parametrize(
    ("case", "rounded"),
    [
        (Case(70, 1664, 640, asymmetric=True), False),
        (Case(520, 256, 128, 256, bits=8), False),
        (Case(65, 128, 72, dtype="float16"), False),
        (Case(100, 1376, 128, 32, asymmetric=True), True),
    ],
    ids=str,
)
def test_many_rows_agree_with_float64(case: Case, rounded: bool) -> None:
    product = functools.partial(
        grouped_tpu.tpu_product, bits=case.bits, dtype="float32", interpret=True
    )
    check(jax.jit(product, compiler_options=QUICK), case, rounded=rounded)


def test_matrix_units_that_add_up_get_scaled_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
    monkeypatch.setattr(grouped_tpu.choice, "device", lambda: chip)
    product = functools.partial(grouped_tpu.tpu_product, dtype="float32", interpret=True)
    for case in (Case(65, 256, 128), Case(65, 256, 128, dtype="float32")):
        drawn = draw(case)
        check(functools.partial(product, bits=4), case, rounded=case.dtype == "bfloat16")
    monkeypatch.setattr(
        grouped_tpu.choice, "device", lambda: jax.sharding.AbstractDevice("TPU v4", 2, "tpu")
    )
    with pytest.raises(NotImplementedError, match="more than 64 rows on a TPU v4"):
        product(**drawn, bits=4)


def test_scales_may_be_the_bits_of_float16() -> None:
    drawn = draw(Case(2, 256, 128))
    bits: dict[str, Any] = {"scales": jax.lax.bitcast_convert_type(drawn["scales"], jnp.int16)}
    given, same = (
        grouped_tpu.tpu_product(**x, bits=4, interpret=True) for x in (drawn, drawn | bits)
    )
    assert given.dtype == same.dtype == jnp.bfloat16  # that of x
    np.testing.assert_array_equal(np.asarray(given), np.asarray(same))


def test_declines() -> None:
    case = Case(2, 256, 128)

    def product(**drawn: Any) -> jax.Array:
        return grouped_tpu.tpu_product(**{"bits": 4, "interpret": True} | drawn)

    with pytest.raises(NotImplementedError, match="grouped_tpu: dtype float8_e5m2"):
        product(**draw(case) | {"x": jnp.zeros((2, 256), jnp.float8_e5m2)})
    with pytest.raises(NotImplementedError, match="grouped_tpu: 2 bits, only 4 and 8"):
        product(**draw(case), bits=2)
    with pytest.raises(NotImplementedError, match="groups of 96 inputs, only 8, 16, 32, 64 and"):
        product(**draw(dataclasses.replace(case, inputs=288, size=96)))
    with pytest.raises(NotImplementedError, match=r"64 rows of float32 .* 16 .* only up to 512"):
        product(**draw(dataclasses.replace(case, rows=64, size=16, dtype="float32")))
    with pytest.raises(NotImplementedError, match="more than 64 rows for groups of 16 inputs"):
        product(**draw(dataclasses.replace(case, rows=65, size=16, dtype="float32")))
