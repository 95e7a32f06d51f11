"""The kernels for TPUs compile for every published size, fit into VMEM, and hold O(T) memory.

Mosaic refuses a kernel that does not fit, so that it compiles says that it does.
"""

import jax
import pytest

from benchmarks import aot, kernel_cost
from qwen_jax import attention
from qwen_jax.kernels import decode_tpu
from qwen_jax.kernels.flash import HEAD_DIMS
from tests.aot.conftest import Case, parameter

HEADS = (16, 32, 40, 64)  # of the 1.8B, the 7B, the 14B and the 72B
LENGTHS = (512, 2048, 8192, 32768)
# Temporary bytes for each element of q: float32 sums of dq, dk, dv, and q, k, v with heads first.
# Where dq is summed part by part, as few queries fit into VMEM, dk and dv are there twice.
TEMPORARY = {"v4": 32, "v5e": 24, "v5p": 36, "v6e": 24, "v7x": 36}
TARGETS = tuple(TEMPORARY)

# Every size on every target, and every length: in each target another size has the longest. A
# shape of each target but v7x is run by `make test`.
SIZES = [
    parameter(
        Case(target, length, HEADS[(i + j) % len(HEADS)]),
        smoke=length == 2048 and target != "v7x",  # whose blocks are those of a v6e there
    )
    for i, target in enumerate(TARGETS)
    for j, length in enumerate(LENGTHS)
]
DIMS = [parameter(Case("v5e", 2048, 4, dim), release=dim != 64) for dim in HEAD_DIMS if dim != 128]
DECODE = [
    parameter(Case(target, 2048, heads), smoke=heads == 16) for target in TARGETS for heads in HEADS
]


def kernels(programs: list[aot.Program]) -> list[str]:
    return [x.name for x in programs]


@pytest.mark.parametrize("case", [*SIZES, *DIMS], ids=str)
def test_forward_and_backward(case: Case) -> None:
    built = kernel_cost.both_passes(
        attention.IMPLEMENTATIONS["pallas_tpu"], case.batch, case.length, case.heads, case.dim
    )
    compiled, programs = aot.compile_tpu(*built, case.target)
    for kernel in ("flash_forward", "flash_backward"):
        assert sum(kernel in name for name in kernels(programs)) == 1
    # The heads of other dims than 128 lie in registers of 128 lanes.
    room = TEMPORARY[case.target] * case.queries * max(1, 128 / case.dim)
    assert temporary(compiled) < room + 2**20


@pytest.mark.parametrize("case", [*DECODE, Case("v5e", 32768, 32), *DIMS], ids=str)
@pytest.mark.parametrize("cache", [None, "int8"], ids=["bf16", "int8"])
def test_decode(case: Case, cache: str | None) -> None:
    compiled, programs = aot.compile_tpu(
        *kernel_cost.our_decode(
            decode_tpu.tpu_decode, case.batch, case.length, cache, case.heads, case.dim
        ),
        case.target,
    )
    assert sum(decode_tpu.NAME in name for name in kernels(programs)) == 1
    # The cache is neither copied nor dequantised; but XLA keeps one of fewer than 128 lanes without
    # padding, and pads a copy for the kernel.
    if case.dim >= 128:
        assert temporary(compiled) < case.queries // 64 + 2**19


@pytest.mark.smoke
def test_decode_of_one_head() -> None:
    """Of a device of tp = K. Mosaic multiplies with vectors otherwise than with matrices."""
    case = Case("v5e", 2048, heads=1)
    built = kernel_cost.our_decode(decode_tpu.tpu_decode, case.batch, case.length, None, 1)
    for _ in range(2):  # what was compiled before is compiled, and found, again
        compiled, programs = aot.compile_tpu(*built, case.target)
        assert sum(decode_tpu.NAME in name for name in kernels(programs)) == 1
    cache = 2 * case.queries * 2  # keys and values, bfloat16
    assert temporary(compiled) < cache / 100


def temporary(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
