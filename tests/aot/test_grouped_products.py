"""Products with weights in groups compile for every published size, and copy no weight.

On TPUs they cost at most as many cycles as unpacking must, and with four bits or eight fewer than
the weight needs to arrive. On GPUs they spill no register.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import aot
from qwen_jax import PRESETS
from qwen_jax.kernels import grouped_hopper, grouped_tpu, grouped_triton, grouped_xla
from tests.aot.conftest import parameter

GROUP = 128
WEIGHTS = 2**20


def matrices(name: str, tp: int) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and the size of a group of a device's part of each kind of weight."""
    config = PRESETS[name]
    width, inner = config.hidden_size, config.intermediate_size

    def by_rows(inputs: int) -> tuple[int, int, int]:
        return inputs // tp, width, math.gcd(GROUP, inputs // tp)

    return {
        "q": (width, width // tp, GROUP),
        "o": by_rows(width),
        "up": (width, inner // tp, GROUP),
        "down": by_rows(inner),
    }


def arguments(
    matrix: tuple[int, int, int], bits: int, *, rows: int, scales: Any, zeros: bool = False
) -> tuple[Any, ...]:
    inputs, outputs, size = matrix
    of_groups = (inputs // size, outputs)
    given = [
        jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((inputs * bits // 32, outputs), jnp.uint32),
        jax.ShapeDtypeStruct(of_groups, scales),
    ]
    return *given, *[jax.ShapeDtypeStruct(of_groups, jnp.uint8)] * zeros


def on_tpu(target: str, given: tuple[Any, ...], bits: int) -> tuple[jax.stages.Compiled, aot.Cost]:
    def product(x: Any, codes: Any, scales: Any, zeros: Any = None) -> jax.Array:
        return grouped_tpu.tpu_product(x, codes, scales=scales, zeros=zeros, bits=bits)

    # As `grouped.for_kernel` lays out words.
    compiled, programs = aot.compile_tpu(product, given, target, row_major=[1])
    (ours,) = (x for x in programs if grouped_tpu.NAME in x.name)
    return compiled, aot.steady(ours)


def case(target: str, name: str, tp: int, bits: int, *, smoke: str) -> Any:
    """A case of a table. smoke: the target whose smallest case is one of `make test`."""
    return parameter(
        target,
        name,
        tp,
        bits,
        smoke=(target, name, bits) == (smoke, "qwen-1.8b", 4),
        release=name in ("qwen-14b", "qwen-72b"),
    )


# Each size on each target, on one device or on as many as this list says.
TPUS = [
    case(target, name, tp, bits, smoke="v5e")
    for target, split in {
        "v5e": (8, 1, 4, 1),
        "v6e": (1, 8, 1, 8),
        "v5p": (4, 2, 8, 1),
    }.items()
    for name, tp in zip(("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b"), split, strict=True)
    for bits in (4, 8)
]


@pytest.mark.parametrize(("target", "name", "tp", "bits"), TPUS)
def test_compiles_for_tpus(target: str, name: str, tp: int, bits: int) -> None:
    for matrix in matrices(name, tp).values():
        given = arguments(matrix, bits, rows=8, scales=jnp.int16)
        compiled, cost = on_tpu(target, given, bits)
        inputs, _, size = matrix
        # x in the kernel's order, twice, and with rows of its own for each group of 128 inputs.
        room = 2 * 2 * 16 * inputs * max(1, 64 // size) + 2**16
        assert temporary(compiled) <= room
        assert cost.spills < cost.step.cycles / 10


# Bundles for 1,048,576 weights: those of the cheapest way to unpack that was found in a kernel of
# one block, without a grid. One with zeros multiplies by them, too.
LIMITS = {
    ("v5e", 4): 705, ("v6e", 4): 591, ("v5p", 4): 748,
    ("v5e", 8): 859, ("v6e", 8): 592, ("v5p", 8): 902,
}  # fmt: skip


@pytest.mark.parametrize(("target", "bits"), LIMITS)
def test_costs_no_more_than_unpacking_must(target: str, bits: int) -> None:
    for kind in ("up", "down"):
        matrix = matrices("qwen-7b", 1)[kind]
        for zeros in (False, True):
            given = arguments(matrix, bits, rows=16, scales=jnp.int16, zeros=zeros)
            _, cost = on_tpu(target, given, bits)
            shape = grouped_tpu.shape_of(*given[:3], bits=bits, native=target == "v6e" or bits == 8)
            weights = shape.inputs * shape.columns
            cycles = cost.step.cycles / weights * WEIGHTS
            if not zeros:
                assert cycles <= LIMITS[target, bits]
            arrives = weights * (bits + (16 + 8 * zeros) / GROUP) / 8 / aot.TPUS[target].hbm
            if target != "v5p":
                assert cost.step.cycles < arrives


# The share of a matrix unit's time that many rows must use, of a weight that is nowhere whole.
@pytest.mark.parametrize(("target", "share"), [("v5e", 0.9), ("v5p", 0.9), ("v6e", 0.83)])
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_keep_matrix_units_busy(target: str, share: float, bits: int) -> None:
    for kind in ("up", "down"):
        given = arguments(
            matrices("qwen-7b", 1)[kind], bits, rows=2048, scales=jnp.int16, zeros=bits == 8
        )
        compiled, cost = on_tpu(target, given, bits)
        shape = grouped_tpu.blocks_of(*given[:3], bits=bits, kind=aot.TPUS[target].kind)
        busy = 2 * shape.rows * shape.columns * shape.depth / aot.TPUS[target].flops
        assert busy >= share * cost.step.cycles
        assert temporary(compiled) < 2**20


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_float16_scales_alone_are_copied(target: str) -> None:
    matrix = matrices("qwen-7b", 1)["down"]
    given = arguments(matrix, 4, rows=1, scales=jnp.float16)
    compiled, _ = on_tpu(target, given, 4)
    assert temporary(compiled) <= given[2].size * 2 + 2**20


GPUS = [
    case(target, name, tp, bits, smoke="h100")
    for target, split in {"h100": (8, 1, 4, 1), "a100": (2, 4, 2, 8)}.items()
    for name, tp in zip(("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b"), split, strict=True)
    for bits in (4, 8)
]


@pytest.mark.parametrize(("target", "name", "tp", "bits"), GPUS)
def test_compiles_for_gpus(target: str, name: str, tp: int, bits: int) -> None:
    def product(x: Any, codes: Any, scales: Any, zeros: Any = None) -> jax.Array:
        return grouped_triton.triton_product(x, codes, scales=scales, zeros=zeros, bits=bits)

    for matrix in matrices(name, tp).values():
        for rows, zeros in ((8, False), (256, True)):
            given = arguments(matrix, bits, rows=rows, scales=jnp.float16, zeros=zeros)
            compiled, kernels = aot.compile_gpu(product, given, target)
            (ours,) = (kernel for kernel in kernels if grouped_triton.NAME in kernel.name)
            assert not ours.spilled
            inputs, outputs, _ = matrix
            splits = grouped_triton.shape_of(*given[:3], bits=bits).splits
            results = splits * rows * outputs * 4
            # Results of all splits, x in the kernel's order, and sums of x over groups of 16.
            assert temporary(compiled) <= results + max(rows, 16) * inputs * 3 + 2**16


def hopper_case(name: str, tp: int, bits: int, rows: int) -> Any:
    smoke = (name, bits, rows) == ("qwen-1.8b", 4, 8)
    often = smoke or (name, bits, rows) == ("qwen-7b", 8, 256)
    return parameter(name, tp, bits, rows, smoke=smoke, release=not often)


HOPPER = [
    hopper_case(name, tp, bits, rows)
    for name, tp in (("qwen-1.8b", 2), ("qwen-7b", 1), ("qwen-14b", 2), ("qwen-72b", 8))
    for bits in (4, 8)
    for rows in ((8, 256, 2048) if name == "qwen-7b" else (8, 256))
]


@pytest.mark.parametrize(("name", "tp", "bits", "rows"), HOPPER)
def test_compiles_for_hopper(name: str, tp: int, bits: int, rows: int) -> None:
    def product(x: Any, codes: Any, scales: Any, zeros: Any = None) -> jax.Array:
        return grouped_hopper.hopper_product(x, codes, scales=scales, zeros=zeros, bits=bits)

    for matrix in sorted({*matrices(name, tp).values()}):
        for zeros in (False, True):
            outputs = matrix[1]
            given = arguments(matrix, bits, rows=rows, scales=jnp.float16, zeros=zeros)
            compiled, kernels = aot.compile_gpu(product, given, "h100")
            (ours,) = (kernel for kernel in kernels if grouped_hopper.NAME in kernel.name)
            assert not ours.spilled and ours.shared <= 227 * 1024
            shape = grouped_hopper.shape_of(*given[:3], bits=bits)
            # Results of all splits, and x in the kernel's order, as often as groups need it.
            results = shape.splits * rows * outputs * 4 if shape.splits > 1 else 0
            arranged = rows * shape.steps * shape.parts * shape.width * 2
            assert temporary(compiled) <= results + arranged + 2**16


@pytest.mark.parametrize("target", ["h100", "a100"])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_row_on_gpus_writes_no_weight(target: str, bits: int) -> None:
    def product(x: Any, codes: Any, scales: Any, zeros: Any = None) -> jax.Array:
        return grouped_xla.one_row(x, codes, scales=scales, zeros=zeros, bits=bits)

    for kind in ("up", "down"):
        for zeros in (False, True):
            matrix = matrices("qwen-7b", 1)[kind]
            given = arguments(matrix, bits, rows=1, scales=jnp.float16, zeros=zeros)
            compiled, kernels = aot.compile_gpu(product, given, target)
            # On an A100 XLA cuts x into its places beforehand, with eight bits.
            assert len(kernels) == 2 + (bits == 8 and target == "a100")
            assert not any(kernel.spilled for kernel in kernels)
            of_groups = given[2].size * 4
            assert temporary(compiled) <= of_groups + 2**16


def temporary(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
