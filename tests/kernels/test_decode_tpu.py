"""The decode kernel for TPUs, interpreted on the CPU, against softmax in float64."""

import dataclasses
import functools

import jax
import pytest

from qwen_jax.kernels import decode_tpu
from tests.kernels import paged_cases
from tests.kernels.decode_cases import FULL, Case, check, draw
from tests.support.tiny import QUICK

CASES = {
    "one token": Case(1, 8, 1, 256, 64, 200, (0, 72, 199), block=128),
    "full ring": Case(1, 8, 1, 256, 32, 256, (0, 1, 17), block=128),
    "wrapped": Case(1, 4, 1, 384, 64, 1000, (616, 650, 990), block=128),
    "wrapped in one block": Case(1, 2, 1, 300, 64, 1000, (700, 701, 999), block=128),
    "not begun": Case(2, 8, 1, 256, 64, 10, (11, 12, 300, 10, 5), block=128),
    "nothing begun": Case(1, 8, 1, 256, 64, 10, (12, 300), block=128),
    "empty": Case(1, 8, 1, 256, 64, 0, (0, 0), block=128),
    "first rows not begun": Case(1, 8, 1, 256, 64, 200, (300, 201, 7, 300, 8), block=128),
    "window": Case(1, 8, 1, 1024, 64, 900, (0, 500, 890), window=130, block=128),
    "window wraps": Case(3, 8, 1, 512, 64, 1100, (600, 700, 1099), window=100, block=128),
    "window of own": Case(4, 8, 1, 256, 64, 200, (0, 199, 201), window=2, block=128),
    "window of one": Case(2, 8, 1, 256, 64, 200, (0, 199), window=1, block=128),
    "odd ring": Case(2, 3, 2, 333, 80, 500, (168, 200, 450), block=128),
    "ring of seven": Case(1, 5, 1, 7, 64, 9, (2, 5)),
    "groups": Case(1, 4, 8, 256, 128, 250, (0, 100), block=128),
    "groups of three": Case(3, 4, 3, 256, 96, 250, (0, 100, 249), window=60, block=128),
    "many rows": Case(16, 2, 5, 256, 64, 230, (0, 229, 240), window=20, block=128),
    "many heads": Case(1, 40, 1, 256, 128, 250, (0, 100), block=128),
    "odd heads": Case(2, 20, 1, 256, 128, 250, (0, 100), block=256),
    "wide": Case(2, 2, 4, 256, 256, 250, (0, 100), block=128),
    "bfloat16": Case(1, 16, 1, 512, 128, 600, (100, 400), dtype="bfloat16", block=256),
    "bfloat16 groups": Case(4, 4, 2, 512, 128, 600, (100, 400), 90, "bfloat16", block=128),
}
QUANTISED = {
    "int8": Case(1, 8, 1, 384, 64, 500, (120, 400, 500), kind="int8", block=128),
    "int8 asymmetric": Case(1, 8, 1, 384, 64, 500, (120, 400, 501), kind="asymmetric", block=128),
    "int8 groups": Case(2, 3, 2, 333, 80, 500, (168, 400), 70, kind="asymmetric", block=128),
    "int8 rows": Case(4, 2, 4, 256, 128, 300, (50, 290), kind="int8", block=128),
    "int8 bfloat16": Case(1, 16, 1, 512, 128, 600, (100, 400), FULL, "bfloat16", "int8", 256),
    "int8 asymmetric bfloat16": Case(
        3, 4, 2, 512, 128, 600, (100, 400), 300, "bfloat16", "asymmetric", 128
    ),
}


@pytest.mark.parametrize("name", CASES | QUANTISED)
def test_agrees_with_softmax(name: str) -> None:
    case = (CASES | QUANTISED)[name]
    drawn = draw(case, sum(map(ord, name)))
    attend = functools.partial(decode_tpu.tpu_decode, interpret=True, block=case.block)
    check(jax.jit(attend, compiler_options=QUICK), case, drawn)


def test_declines_float16() -> None:
    drawn = draw(dataclasses.replace(CASES["one token"], dtype="float16"), 0)
    with pytest.raises(NotImplementedError, match="decode_tpu: dtype float16"):
        decode_tpu.tpu_decode(**drawn, interpret=True)


PAGED = {
    "one token": paged_cases.Case(1, 8, 1, 128, 64, 3, (192, 129, 0, 5)),
    "int8": paged_cases.Case(3, 2, 2, 128, 32, 10, (300, 1, 0), "bfloat16", True),
}


@pytest.mark.parametrize("name", PAGED)
def test_pages_agree_with_softmax(name: str) -> None:
    attend = functools.partial(decode_tpu.tpu_paged_decode, interpret=True, block=128)
    paged_cases.check(
        jax.jit(attend, compiler_options=QUICK), PAGED[name], windows=(FULL, 130, 2, 1)
    )


def test_declines_pages_that_it_would_copy() -> None:
    drawn = paged_cases.draw(PAGED["one token"], FULL)
    with pytest.raises(NotImplementedError, match=r"decode_tpu: pages of 15 .* multiples of 8"):
        decode_tpu.tpu_paged_decode(**drawn | {"kv": drawn["kv"][:, :, :, :15]}, interpret=True)
    with pytest.raises(NotImplementedError, match=r"pages of 48 .* divisors and multiples of 128"):
        decode_tpu.tpu_paged_decode(**drawn | {"kv": drawn["kv"][:, :, :, :48]}, interpret=True)
    narrow = {name: drawn[name][..., :64] for name in ("q", "kv")}
    with pytest.raises(NotImplementedError, match="decode_tpu, pages: head dim 64, only 128, 256"):
        decode_tpu.tpu_paged_decode(**drawn | narrow, interpret=True)
