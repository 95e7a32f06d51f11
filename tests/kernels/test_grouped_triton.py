"""Products with weights in groups for NVIDIA GPUs, interpreted on the CPU, against float64."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import grouped_triton
from tests.kernels.grouped_cases import Case, check, draw
from tests.support.tiny import QUICK

CASES = [
    (Case(1, 256, 200), 1),
    (Case(3, 1376, 72, 32), None),
    (Case(16, 640, 128, bits=8, asymmetric=True), 2),
    (Case(5, 304, 128, 16, dtype="float32", asymmetric=True, scales="float32"), 3),
    (Case(20, 256, 128, bits=8, dtype="float16"), 2),
    (Case(2, 768, 128, 256), 4),
    (Case(70, 256, 128), 1),
    (Case(33, 128, 128, 16, asymmetric=True), 1),
]


@pytest.mark.parametrize(("case", "splits"), CASES, ids=str)
def test_agrees_with_float64(case: Case, splits: int | None) -> None:
    product = functools.partial(
        grouped_triton.triton_product,
        bits=case.bits,
        dtype="float32",
        interpret=True,
        splits=splits,
    )
    check(jax.jit(product, compiler_options=QUICK), case)


def test_declines() -> None:
    case = Case(2, 256, 128)

    def product(**drawn: Any) -> jax.Array:
        return grouped_triton.triton_product(**drawn, bits=4, interpret=True)

    assert product(**draw(case)).dtype == jnp.bfloat16  # x's
    with pytest.raises(NotImplementedError, match="grouped_triton: dtype float8_e5m2"):
        product(**draw(case) | {"x": jnp.zeros((2, 256), jnp.float8_e5m2)})
    with pytest.raises(NotImplementedError, match="groups of 96 inputs, only 8, 16, 32, 64 and"):
        product(**draw(dataclasses.replace(case, inputs=288, size=96)))


def run(ptx: str, first: int, second: int) -> int:
    """Run the few instructions of PTX that unpack two words; the result is two bfloat16 numbers."""
    state = {"$1": first, "$2": second}

    def read(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return state[name] if name in state else int(name, 0)

    def number(bits: int) -> np.float32:
        return np.uint32(bits).view(np.float32)

    def bits(x: np.float32) -> int:
        return int(np.float32(x).view(np.uint32))

    def bfloat16(x: np.float32) -> int:
        return int(np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16))

    def halves(x: int) -> list[np.float32]:
        return [number((x & 0xFFFF) << 16), number(x & 0xFFFF0000)]

    for line in re.sub(r"[{}]", "", ptx).split(";"):
        name, *arguments = line.replace(",", " ").split() or [".reg"]
        if name == ".reg":
            continue
        target, *given = arguments[0], *map(read, arguments[1:])
        if name == "prmt.b32":
            pool = [(x >> (8 * k)) & 255 for x in given[:2] for k in range(4)]
            chosen = [pool[(given[2] >> (4 * k)) & 7] for k in range(4)]
            result = sum(byte << (8 * k) for k, byte in enumerate(chosen))
        elif name == "lop3.b32":
            assert given[3] == 0xEA  # of 0xF0, 0xCC and 0xAA for a, b and c: (a & b) | c
            result = (given[0] & given[1]) | given[2]
        elif name == "fma.rn.bf16x2":
            sums = [bfloat16(a * b + c) for a, b, c in zip(*map(halves, given), strict=True)]
            result = sums[0] | sums[1] << 16
        else:
            result = {
                "mov.b32": lambda x: x,
                "shl.b32": lambda x, n: (x << n) & 0xFFFFFFFF,
                "shr.b32": lambda x, n: x >> n,
                "sub.rn.f32": lambda x, y: bits(number(x) - number(y)),
                "cvt.rn.bf16x2.f32": lambda x, y: bfloat16(number(x)) << 16 | bfloat16(number(y)),
            }[name](*given)
        state[target] = result
    return state["$0"]


@pytest.mark.parametrize("bits", [4, 8])
def test_ptx_unpacks_as_the_interpreter_does(bits: int) -> None:
    """No GPU is needed: a code is one of 16 or 256, and its neighbours must not matter."""
    asm = {4: grouped_triton.four_bits, 8: grouped_triton.eight_bits}[bits]
    random = np.random.default_rng(0)
    for j in range(32 // bits):
        for code in range(2**bits):
            other = int(random.integers(2**bits))
            noise = (int(x) for x in random.integers(0, 2**32, 2))
            mask = (2**bits - 1) << (j * bits)
            words = [x & ~mask | c << (j * bits) for x, c in zip(noise, (code, other), strict=True)]
            found = run(asm(j), *words)
            pair = np.asarray([found & 0xFFFF, found >> 16], np.uint32) << 16
            np.testing.assert_array_equal(
                pair.view(np.float32), [code - 2 ** (bits - 1), other - 2 ** (bits - 1)]
            )
