"""The kernels for a cache in pages compile, copy no pool, and cost little more than without pages.

A case's pool is as large as the cache of its rows.
"""

import jax
import pytest

from benchmarks import aot, kernel_cost
from qwen_jax import attention
from qwen_jax.kernels import decode_tpu, decode_triton, flash_triton
from tests.aot.conftest import Case, parameter

KINDS = pytest.mark.parametrize("kind", [None, "int8"], ids=["bf16", "int8"])
# Of the sizes of a page, and of a model's heads, one for each target.
TPUS = [
    parameter(Case(target, 2048, heads), page, smoke=target == "v5e")
    for target, heads, page in (
        ("v4", 16, 64),
        ("v5e", 32, 128),
        ("v5p", 64, 256),
        ("v6e", 40, 128),
        ("v7x", 32, 32),
    )
]


@pytest.mark.parametrize(("case", "page"), [*TPUS, (Case("v5e", 32768, 1), 128)], ids=str)
@KINDS
def test_decode_copies_no_pool(case: Case, page: int, kind: str | None) -> None:
    pool = kernel_cost.our_paged(case.batch, case.length, kind, page=page, heads=case.heads)
    compiled, programs = aot.compile_tpu(decode_tpu.tpu_paged_decode, pool, case.target)
    assert sum(decode_tpu.NAME in x.name for x in programs) == 1
    assert temporary(compiled) < 2**20


@pytest.mark.parametrize(
    ("case", "page"),
    [
        parameter(Case("h200", 2048, 32), 128, smoke=True),
        parameter(Case("h200", 32768, 1, 64), 16),
        parameter(Case("a100", 2048, 40), 64),
    ],
)
@KINDS
def test_decode_on_gpus_copies_no_pool(case: Case, page: int, kind: str | None) -> None:
    sizes = {"page": page, "heads": case.heads, "dim": case.dim}
    pool = kernel_cost.our_paged(case.batch, case.length, kind, **sizes)
    compiled, kernels = aot.compile_gpu(decode_triton.triton_paged_decode, pool, case.target)
    ours = kernel_cost.pallas(kernels)
    assert ours and all(decode_triton.NAME in kernel.name for kernel in ours)
    assert not any(kernel.spilled for kernel in ours)
    assert temporary(compiled) < 2**22


@pytest.mark.parametrize("target", ["v5e", "v5p"])
@KINDS
@pytest.mark.parametrize(("batch", "slots"), kernel_cost.CACHES)
def test_decode_costs_little_more_than_without_pages(
    target: str, batch: int, slots: int, kind: str | None
) -> None:
    found = kernel_cost.paged_cycles(target, batch, slots, kind)
    cycles = found["decode_tpu, pages, + own"]
    most = 1.08 if kind is None else 1.14 if batch > 1 else 1.25
    assert cycles <= most * found["decode_tpu"]
    assert cycles <= (0.65 if kind is None else 0.7) * found["ragged_paged_attention"]
    arrival = kernel_cost.cache_bytes("decode_tpu", kind) / aot.TPUS[target].hbm
    assert cycles < batch * slots * kernel_cost.DECODE_HEADS * arrival


@pytest.mark.parametrize("target", ["v5e", "v5p"])
def test_prefill_costs_little_more_than_without_pages(target: str) -> None:
    found = kernel_cost.prefill_cycles(target)
    assert found["flash_tpu, pages", "bf16"] <= 1.03 * found["flash_tpu", "bf16"]
    assert found["flash_tpu, pages", "int8"] <= 1.15 * found["flash_tpu", "bf16"]


@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize(("page", "dim"), [(128, 128), (16, 64)])
@KINDS
def test_prefill_on_gpus_copies_no_pool(target: str, page: int, dim: int, kind: str | None) -> None:
    pool = kernel_cost.our_paged(1, 8192, kind, page=page, dim=dim, tokens=512)
    compiled, kernels = aot.compile_gpu(flash_triton.triton_paged_prefill, pool, target)
    (ours,) = (x for x in kernels if "flash_paged" in x.name)
    assert not ours.spilled
    assert temporary(compiled) < 2**20


# What a pass of two layers needs beside its pages, in MB: float32 o and such for each query.
PASSES = [
    parameter("v5e", "pallas_tpu", 1, 4, smoke=True),
    parameter("v5p", "pallas_tpu", 1, 4),
    parameter("h200", "pallas_hopper", 1, 8, smoke=True),
    parameter("v5e", "pallas_tpu", 512, 128),
    parameter("h200", "pallas_hopper", 512, 128),
]


@pytest.mark.parametrize(("target", "name", "tokens", "megabytes"), PASSES)
@KINDS
def test_a_pass_writes_its_pages_in_place(
    target: str, name: str, tokens: int, megabytes: int, kind: str | None
) -> None:
    rows, slots = (64, 2048) if tokens == 1 else (1, 8192)
    attend = attention.IMPLEMENTATIONS[name]
    built = kernel_cost.paged_layers(attend, rows, slots, kind, tokens=tokens)
    compile = aot.compile_tpu if target in aot.TPUS else aot.compile_gpu
    compiled, _ = compile(*built, target, donate=(0,))
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built[1][0]))
    assert memory is not None and memory.alias_size_in_bytes >= held
    assert temporary(compiled) < megabytes * 2**20


def temporary(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
