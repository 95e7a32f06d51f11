"""Drawn products with weights in groups, and what they must give: a product in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A product of x [rows, inputs] with a weight [inputs, outputs] in groups of `size` inputs."""

    rows: int
    inputs: int
    outputs: int
    size: int = 128
    bits: int = 4
    dtype: str = "bfloat16"
    asymmetric: bool = False
    scales: str = "float16"

    def __str__(self) -> str:
        kind = "asymmetric" if self.asymmetric else "symmetric"
        sizes = f"{self.rows}x{self.inputs}x{self.outputs}-{self.size}"
        return f"{sizes}-{self.bits}bit-{self.dtype}-{kind}-{self.scales}"


def draw(case: Case) -> dict[str, Any]:
    """The arguments of a product; a few scales are subnormal, as float16 numbers, or negative."""
    random = np.random.default_rng(case.inputs + case.outputs)
    groups = case.inputs // case.size
    codes = random.integers(0, 2**case.bits, (case.inputs, case.outputs), np.uint8)
    scales = random.uniform(0.5, 1.5, (groups, case.outputs)) * 2.0**-6
    rare = random.random(scales.shape)
    scales = np.where(rare < 0.02, -scales, np.where(rare > 0.98, scales * 2.0**-9, scales))
    zeros = random.integers(0, 2**case.bits, scales.shape, np.uint8)
    return {
        "x": jnp.asarray(random.standard_normal((case.rows, case.inputs)), case.dtype),
        "codes": jnp.asarray(_packed(codes, case.bits)),
        "scales": jnp.asarray(scales, case.scales),
        "zeros": jnp.asarray(zeros) if case.asymmetric else None,
    }


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words of successive inputs, the first in the lowest bits."""
    fields = codes.reshape(-1, 32 // bits, codes.shape[1]).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(fields << shifts, 1)


def reference(
    case: Case, drawn: dict[str, Any], *, rounded: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sum of the sizes of its terms.

    rounded: whether the weight is one of bfloat16.
    """
    words = np.asarray(drawn["codes"])
    fields = [
        (words >> np.uint32(k)) & np.uint32(2**case.bits - 1) for k in range(0, 32, case.bits)
    ]
    codes = np.stack(fields, 1).reshape(case.inputs, case.outputs).astype(np.float64)
    zeros: Any = drawn["zeros"]
    zeros = 2.0 ** (case.bits - 1) if zeros is None else np.asarray(zeros, np.float64)
    scales, zeros = (
        np.repeat(np.broadcast_to(x, drawn["scales"].shape), case.size, 0)
        for x in (np.asarray(drawn["scales"], np.float64), zeros)
    )
    x, weight = np.asarray(drawn["x"], np.float64), (codes - zeros) * scales
    if rounded:
        weight = weight.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    return x @ weight, np.abs(x) @ np.abs(weight)


def check(product: Callable[..., jax.Array], case: Case, *, rounded: bool = False) -> None:
    """Run a product that returns float32, to within 1e-6 of the sum of its terms' sizes.

    rounded: whether the weight may be rounded to bfloat16.
    """
    drawn = draw(case)
    y = product(**drawn)
    expected, sizes = reference(case, drawn, rounded=rounded)
    assert y.dtype == jnp.float32 and y.shape == expected.shape
    error = np.max(np.abs(np.asarray(y, np.float64) - expected) / sizes)
    assert error <= 1e-6, error
