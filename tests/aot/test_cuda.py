"""The kernels for NVIDIA GPUs compile for every published size, spill nothing, hold O(T) memory."""

from types import ModuleType

import jax
import pytest

from benchmarks import aot, kernel_cost
from qwen_jax import attention
from qwen_jax.kernels import decode_triton, flash_hopper, flash_triton
from qwen_jax.kernels.flash import HEAD_DIMS
from tests.aot.conftest import Case, parameter

HEADS = (16, 32, 40, 64)  # of the 1.8B, the 7B, the 14B and the 72B
LENGTHS = (512, 2048, 8192, 32768)
TARGETS = ("h200", "a100")
SPILLED = {
    96: 32
}  # bytes at most, by head dim: on the A100 the widest kernel lacks a few registers
TEMPORARY = 2.5  # bytes for each element of q: it is held once more, scaled

KERNELS = ((flash_hopper, "h200"), (flash_triton, "h200"), (flash_triton, "a100"))
# A shape of each kernel and target is run by `make test`.
SIZES = [
    parameter(module, Case(target, length, heads), smoke=length == 2048)
    for module, target in KERNELS
    for length, heads in zip(LENGTHS, HEADS, strict=True)
]
DIMS = [(dim, Case(target, 2048, 4, dim)) for target in TARGETS for dim in HEAD_DIMS if dim != 128]
NARROW = [parameter(case, release=dim != 64) for dim, case in DIMS]
DECODE = [
    parameter(Case(target, 2048, heads), smoke=heads == 16) for target in TARGETS for heads in HEADS
]


@pytest.mark.parametrize(
    ("module", "case"),
    [*SIZES, *(parameter(flash_triton, case, release=dim != 64) for dim, case in DIMS)],
)
def test_forward_and_backward(module: ModuleType, case: Case) -> None:
    attend = attention.IMPLEMENTATIONS[module.NAME]
    built = kernel_cost.both_passes(attend, case.batch, case.length, case.heads, case.dim)
    compiled, kernels = aot.compile_gpu(*built, case.target)
    ours = kernel_cost.pallas(kernels)
    assert len(ours) == 3 and all("flash" in kernel.name for kernel in ours)
    assert max(kernel.spilled for kernel in ours) <= SPILLED.get(case.dim, 0)
    assert temporary(compiled) < TEMPORARY * case.queries + 2**20


@pytest.mark.parametrize("case", [*DECODE, Case("h200", 32768, 32), *NARROW], ids=str)
@pytest.mark.parametrize("cache", [None, "int8"], ids=["bf16", "int8"])
def test_decode(case: Case, cache: str | None) -> None:
    built = kernel_cost.our_decode(
        decode_triton.triton_decode, case.batch, case.length, cache, case.heads, case.dim
    )
    compiled, kernels = aot.compile_gpu(*built, case.target)
    ours = kernel_cost.pallas(kernels)
    assert ours and all(decode_triton.NAME in kernel.name for kernel in ours)
    assert not any(kernel.spilled for kernel in ours)
    assert temporary(compiled) < case.queries // 16 + 2**20  # the cache is not dequantised


def temporary(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
