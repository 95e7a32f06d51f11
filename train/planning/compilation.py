"""Compiles one program of a plan, and reads its memory, work and collectives from the compiler.

The memory of a program's arguments is known by name; the compiler reports the rest.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from train.planning import collectives, flops
from train.planning.collectives import Collective
from train.planning.flops import Work


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a program on each device, in bytes.

    parts: the bytes by name, such as "weights"; they add up to the compiler's total.
    available: the memory that was too small, if the compiler refused the program; otherwise None.
    """

    parts: dict[str, int]
    available: float | None = None

    @property
    def needed(self) -> int:
        """The bytes of all parts together."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or one that the compiler refused for lack of memory.

    memory: the memory of the program on each device.
    work: the work of one device in one run.
    collectives: the collectives of one run; None if the program's text cannot be read.
    seconds: the time it took to compile.
    runs: how often the program runs; in prefill, once per group of layers.
    unread: why the program's text cannot be read, else "".
    """

    memory: Memory
    work: Work
    _: dataclasses.KW_ONLY
    collectives: list[Collective] | None
    seconds: float
    runs: float = 1
    unread: str = ""

    @property
    def refused(self) -> bool:
        """Whether the compiler refused the program for lack of memory."""
        return self.memory.available is not None


# Platforms whose programs jaxlib cannot always print. Some TPU programs have instructions that it
# cannot read back from libtpu (an asynchronous operation with several operands); it then writes a
# C++ trace to stderr. libtpu itself prints all programs.
_PRINTED_BY_COMPILER = ("tpu",)
_PRINTED = "after_optimizations.txt"  # how the name of the final program's file ends


def compile_program(
    trace: Callable[[], jax.stages.Traced], mesh: Mesh, *, held: dict[str, int], layers: int
) -> Program:
    """Trace and compile a program.

    trace: traces the program.
    mesh: the mesh that it is compiled for.
    held: the bytes of its arguments on a device, by name.
    layers: the number of layers, by which `flops.work` finds loops over the layers.
    """
    started = time.perf_counter()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        traced = trace()
        work = flops.work(traced, layers)
        lowered = traced.lower()
        printed = mesh.devices.flat[0].platform in _PRINTED_BY_COMPILER
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options if printed else None)
        except jax.errors.JaxRuntimeError as error:
            memory = _refused(str(error), held)
            if memory is None:
                raise
            refused = "the compiler refused the program"
            seconds = time.perf_counter() - started
            return Program(memory, work, collectives=None, seconds=seconds, unread=refused)
        found, unread = None, ""
        try:
            text = _printed(Path(folder), lowered) if printed else compiled.as_text() or ""
            found = collectives.of(text, mesh)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            unread = f"the text of the compiled program cannot be read ({_first_line(error)})"
    memory = _memory(compiled.memory_analysis(), held, kept=work.kept)
    seconds = time.perf_counter() - started
    return Program(memory, work, collectives=found, seconds=seconds, unread=unread)


def _printed(folder: Path, lowered: jax.stages.Lowered) -> str:
    """Read the text of the final program, which the compiler has dumped into `folder`.

    Raises ValueError if the compiler did not write exactly one such file.
    """
    module: Any = lowered.compiler_ir()  # of MLIR, whose classes have no types
    name = module.operation.attributes["sym_name"].value
    files = sorted(folder.glob(f"*.{name}.*{_PRINTED}"))
    if len(files) != 1:
        raise ValueError(f"the compiler wrote {len(files)} files *.{name}.*{_PRINTED}, not one")
    return files[0].read_text(encoding="utf-8")


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, cut to 200 characters."""
    return str(error).partition("\n")[0][:200]


def _memory(totals: Any, held: dict[str, int], *, kept: int) -> Memory:
    """Split the compiler's totals of memory into parts with names.

    totals: the result of `memory_analysis()`.
    held: the bytes of the program's arguments on a device, by name.
    kept: the bytes that the forward pass keeps for the backward pass.
    """
    kept = min(kept, totals.temp_size_in_bytes)
    parts = {
        **held,
        # Arguments take more than their elements where the hardware pads them.
        "padding": totals.argument_size_in_bytes - sum(held.values()),
        "residuals": kept,
        "temporaries": totals.temp_size_in_bytes - kept,
        "outputs": totals.output_size_in_bytes - totals.alias_size_in_bytes,
        "program": totals.generated_code_size_in_bytes,
    }
    return Memory(parts)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# libtpu's two messages for a program that does not fit. If it has not scheduled the program, it
# calls the whole need temporaries; that number includes arguments and results.
_NEEDED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|\({_SIZE}\) exceeds available HBM \({_SIZE}\)")


def _refused(message: str, held: dict[str, int]) -> Memory | None:
    """Read the memory from the message of a compiler that ran out of it; None for another error.

    held: the bytes of the program's arguments on a device, by name.
    """
    found = _NEEDED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    needed, unit, available, other = (x for x in found.groups() if x is not None)
    total = float(needed) * _UNITS[unit]
    rest = max(0, round(total) - sum(held.values()))
    return Memory({**held, "temporaries": rest}, float(available) * _UNITS[other])
