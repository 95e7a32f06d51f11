"""The decode kernel for NVIDIA GPUs, interpreted on the CPU, against softmax in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qwen_jax.kernels import decode_triton
from qwen_jax.kernels.flash import HEAD_DIMS
from tests.kernels import paged_cases
from tests.kernels.decode_cases import FULL, Case, check, draw
from tests.support.tiny import QUICK


@dataclasses.dataclass(frozen=True)
class Split(Case):
    block: int | None = 16
    splits: int = 2


# What compiles to the same program stands together, and is compiled once.
CASES = {
    "one token": Split(1, 2, 1, 96, 64, 50, (0, 22, 49)),
    "full ring": Split(1, 2, 1, 96, 64, 96, (0, 1, 17)),
    "wrapped": Split(1, 2, 1, 96, 64, 1000, (904, 920, 990)),
    "not begun": Split(1, 2, 1, 96, 64, 10, (10, 11, 2**31 - 1)),
    "nothing begun": Split(1, 2, 1, 96, 64, 0, (1, 2, 3)),
    "empty": Split(1, 2, 1, 96, 64, 0, (0, 0, 1)),
    "window": Split(1, 2, 1, 96, 64, 90, (0, 20, 85), window=50),
    "window wraps": Split(3, 1, 2, 96, 64, 1100, (1004, 1030, 1099), window=50, splits=3),
    "window of own": Split(3, 1, 2, 96, 64, 50, (0, 49, 51), window=2, splits=3),
    "window of one": Split(3, 1, 2, 96, 64, 50, (0, 49, 52), window=1, splits=3),
    "some not begun": Split(3, 1, 2, 96, 64, 50, (53, 51, 48), splits=3),
    "odd ring": Split(2, 3, 2, 83, 80, 150, (67, 80, 140), splits=3),
    "odd ring, window": Split(2, 3, 2, 83, 80, 150, (67, 80, 140), window=30, splits=3),
    "ring of seven": Split(1, 5, 1, 7, 32, 9, (2, 5), splits=3),
    "groups": Split(1, 2, 8, 64, 128, 60, (0, 30), splits=1),
    "groups of three": Split(3, 2, 3, 64, 96, 60, (0, 30, 59), window=40),
    "several row blocks": Split(16, 1, 5, 64, 64, 60, (0, 59, 70), window=20, splits=3),
    "wide": Split(4, 2, 1, 160, 256, 150, (0, 30), block=32, splits=1),
    "bfloat16": Split(4, 2, 2, 128, 128, 190, (62, 100), 60, "bfloat16", splits=3),
    "float16": Split(2, 2, 2, 128, 80, 120, (10, 100), dtype="float16", block=64),
}
QUANTISED = {
    "symmetric": Split(1, 2, 1, 96, 64, 130, (34, 100, 130), kind="int8"),
    "asymmetric": Split(1, 2, 1, 96, 64, 130, (34, 100, 131), kind="asymmetric", splits=3),
    "odd ring": Split(2, 3, 2, 83, 80, 150, (67, 80), 50, kind="asymmetric"),
    "rows": Split(4, 1, 8, 64, 128, 80, (16, 70), kind="int8", splits=1),
    "bfloat16": Split(1, 4, 1, 128, 128, 190, (62, 100), FULL, "bfloat16", "int8", block=32),
    "asymmetric bfloat16": Split(3, 2, 2, 96, 96, 90, (0, 40), 60, "bfloat16", "asymmetric"),
    "float16": Split(2, 2, 2, 64, 32, 60, (0, 40), FULL, "float16", "asymmetric"),
    "wide": Split(1, 1, 2, 64, 256, 60, (0, 40), FULL, "float16", "int8"),
}
TABLE = CASES | {f"int8: {name}": case for name, case in QUANTISED.items()}


@functools.cache
def interpreted(block: int, splits: int) -> Callable[..., Any]:
    attend = functools.partial(
        decode_triton.triton_decode, interpret=True, block=block, splits=splits
    )
    return jax.jit(attend)


@pytest.mark.parametrize("name", TABLE)
def test_agrees_with_softmax(name: str) -> None:
    case = TABLE[name]
    drawn = draw(case, sum(map(ord, name)))
    check(interpreted(case.block, case.splits), case, drawn)


def test_small_values_survive_float16() -> None:
    case = QUANTISED["float16"]
    drawn = draw(case, 0)
    drawn["v"] *= 1e-3
    values = drawn["cache_v"]
    drawn["cache_v"] = values.replace(scale=values.scale * 1e-3, zero=values.zero * 1e-3)
    check(interpreted(case.block, case.splits), case, drawn)


PAGED = {
    "one token": (paged_cases.Case(1, 2, 1, 96, 48, 3, (140, 33, 0, 5)), 3),
    "int8": (paged_cases.Case(3, 2, 2, 128, 16, 6, (90, 1, 0), "bfloat16", True), 1),
}


@pytest.mark.parametrize("name", PAGED)
def test_pages_agree_with_softmax(name: str) -> None:
    case, splits = PAGED[name]
    attend = functools.partial(decode_triton.triton_paged_decode, interpret=True, splits=splits)
    paged_cases.check(jax.jit(attend, compiler_options=QUICK), case, windows=(FULL, 50, 2, 1))


# jax 0.12 says so of all that Pallas lowers through Triton.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", decode_triton.DTYPES)
@pytest.mark.parametrize("kind", [None, "int8", "asymmetric"])
def test_lowers_for_gpus(dtype: str, kind: str | None) -> None:
    gpu = AbstractDevice("NVIDIA H100", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    for dim in HEAD_DIMS:
        case = Split(1, 2, 2, 512, dim, 300, (0, 30), dtype=dtype, kind=kind)
        drawn = jax.eval_shape(lambda case=case: draw(case, 0))
        with use_abstract_mesh(mesh):
            jax.jit(decode_triton.triton_decode).trace(**drawn).lower(lowering_platforms=("cuda",))


def test_declines() -> None:
    drawn = draw(Split(1, 2, 1, 32, 32, 20, (0,)), 0)
    with pytest.raises(NotImplementedError, match="float8_e5m2"):
        decode_triton.triton_decode(**drawn | {"q": drawn["q"].astype(jnp.float8_e5m2)})
    with pytest.raises(NotImplementedError, match="head dim 16"):
        decode_triton.triton_decode(**draw(Split(1, 2, 1, 32, 16, 20, (0,)), 0))
    with pytest.raises(NotImplementedError, match="a cache of bfloat16, only float32 or int8"):
        decode_triton.triton_decode(**drawn | {"cache_v": drawn["cache_v"].astype(jnp.bfloat16)})
