"""What products with 4- and 8-bit weights cost on accelerators that are not attached.

    JAX_PLATFORMS=cpu python benchmarks/grouped_cost.py [--target v5e v6e v5p h100 a100]

For TPUs: the cycles of a grid step for 1,048,576 weights, as `benchmarks/aot.py` counts them, and
those in which as many weights arrive from HBM; with many rows, the share of the cycles in which
matrix units are busy. For GPUs: registers, shared memory and spills, as ptxas reports them. With
all, the temporary memory of the program. The matrices are those of the 7B. Needs the `aot` extra.
"""

import datetime
import functools
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jax
import jax.numpy as jnp

from benchmarks import aot
from benchmarks.kernel_cost import header, line
from qwen_jax import PRESETS
from qwen_jax.kernels import grouped_hopper, grouped_tpu, grouped_triton
from qwen_jax.runtime import command

GROUP = 128
WEIGHTS = 2**20  # for which cycles are counted
FEW, MANY = (16, 64), 2048
WIDTH, INNER = PRESETS["qwen-7b"].hidden_size, PRESETS["qwen-7b"].intermediate_size
MATRICES = {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}


def arguments(rows: int, inputs: int, outputs: int, bits: int, *, scales: Any) -> list[Any]:
    """x, codes and scales of a product, as shapes."""
    return [
        jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((inputs * bits // 32, outputs), jnp.uint32),
        jax.ShapeDtypeStruct((inputs // GROUP, outputs), scales),
    ]


def on_tpu(target: str, kind: str, bits: int, rows: int) -> None:
    """Print a line for a product of the TPU kernel."""

    def product(x: Any, codes: Any, scales: Any) -> jax.Array:
        return grouped_tpu.tpu_product(x, codes, scales=scales, zeros=None, bits=bits)

    given = arguments(rows, *MATRICES[kind], bits, scales=jnp.int16)
    compiled, programs = aot.compile_tpu(product, given, target)
    (ours,) = (x for x in programs if grouped_tpu.NAME in x.name)
    chip, step = aot.TPUS[target], aot.steady(ours).step
    if rows in FEW:
        native = bits in grouped_tpu.NATIVE.get(chip.kind, ())
        shape = grouped_tpu.shape_of(*given, bits=bits, native=native)
        weights = shape.inputs * shape.columns
        busy = ""
    else:
        blocks = grouped_tpu.blocks_of(*given, bits=bits, kind=chip.kind)
        weights = blocks.depth * blocks.columns
        busy = f"{2 * blocks.rows * weights / chip.flops / step.cycles:.0%}"
    cycles = step.cycles / weights * WEIGHTS
    arrival = WEIGHTS * (bits + 16 / GROUP) / 8 / chip.hbm
    line(
        *(kind, target, f"int{bits}", rows, f"{cycles:.0f}", f"{arrival:.0f}", busy),
        f"{_temporary(compiled):.2f} MB",
    )


def on_gpu(target: str, kind: str, bits: int, rows: int) -> None:
    """Print a line for a product of each kernel for GPUs."""
    forms: dict[str, Any] = {grouped_triton.NAME: grouped_triton.triton_product}
    if aot.GPUS[target].capability == 9:
        forms[grouped_hopper.NAME] = grouped_hopper.hopper_product
    given = arguments(rows, *MATRICES[kind], bits, scales=jnp.float16)
    for name, form in forms.items():
        product = functools.partial(_symmetric, form, bits)
        compiled, kernels = aot.compile_gpu(product, given, target)
        (ours,) = (x for x in kernels if name in x.name)
        line(
            *(f"{kind}, {name}", target, f"int{bits}", rows, ours.registers, ours.threads),
            *(f"{ours.shared / 1024:.0f} KiB", ours.spilled, f"{_temporary(compiled):.2f} MB"),
        )


def _symmetric(form: Any, bits: int, x: Any, codes: Any, scales: Any) -> jax.Array:
    """A product with a weight without zeros."""
    return form(x, codes, scales=scales, zeros=None, bits=bits)


def _temporary(compiled: jax.stages.Compiled) -> float:
    """The temporary memory of a program, in MB."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 1e6


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="What products with 4- and 8-bit weights cost, compiled.")
    known = [*aot.TPUS, *aot.GPUS]
    default = ["v5e", "v6e", "v5p", "h100", "a100"]
    parser.add_argument("--target", nargs="+", choices=known, default=default)
    args = parser.parse_args()
    aot.prepare()  # for TPUs and GPUs, each of which would start without the other's folder
    heads = (
        ([x for x in args.target if x in aot.TPUS], on_tpu, ("cycles", "arrival", "busy")),
        (
            [x for x in args.target if x in aot.GPUS],
            on_gpu,
            ("registers", "threads", "shared", "spilled"),
        ),
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{versions}, {datetime.date.today()}: `python {' '.join(sys.argv)}`\n")
    for targets, show, columns in heads:
        if targets:
            header("matrix", "device", "weights", "rows", *columns, "temporary")
        for target in targets:
            for bits in (4, 8):
                for rows in (*FEW, MANY):
                    for kind in MATRICES:
                        if (target, rows) != ("v4", MANY):  # which the kernel declines
                            show(target, kind, bits, rows)


if __name__ == "__main__":
    main()
