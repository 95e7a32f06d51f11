"""Memory that decoding and prefill need beside the cache, compiled for devices that are not
attached.

    JAX_PLATFORMS=cpu python benchmarks/cache.py [--target v5e:2x2 v5p:2x2x1 h100:1] [--length 4096]
    JAX_PLATFORMS=cpu python benchmarks/cache.py --group 1 2 4 8 --rows 1 8 --length 8192

The model has two layers with the heads of the 7B (32 of 128) and little else, 8 rows, on one
device; prefill takes a chunk of 512 tokens. With --group it is prefill of the 7B itself with a
chunk of 2048 tokens, for each number of layers per program. Prints Markdown, in MB. Needs the `aot`
extra.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen_jax import PRESETS, meshes
from qwen_jax.model import running
from qwen_jax.runtime import command
from train.planning import programs, topology
from train.planning.programs import Program, Setting

ROWS, CHUNK, WHOLE_CHUNK = 8, 512, 2048
TASKS = ["decode", "prefill"]
CONFIG = dataclasses.replace(
    PRESETS["qwen-7b"], num_layers=2, vocab_size=1024, hidden_size=512, intermediate_size=1024
)


def row(where: str, kernel: str, kind: str | None, task: str, program: Program, length: int) -> str:
    """A line of the table. kind: the cache's dtype, None for bfloat16."""
    parts = program.memory.parts
    cells = [where, task, kernel, kind or "bfloat16", f"{ROWS} x {length}"]
    cells += [f"{parts[name] / 1e6:,.0f}" for name in ("cache", "temporaries")]
    return f"| {' | '.join(cells)} |"


def by_group(args: argparse.Namespace) -> None:
    """Print a row for each target, implementation and number of rows, with a column per
    group size.
    """
    print(f"| target | attention | rows | {' | '.join(f'{n} layers' for n in args.group)} |")
    print("|---" * (3 + len(args.group)) + "|")
    for where in args.target:
        asked = topology.parse(where)
        mesh = meshes.make({}, topology.devices(asked)[:1])
        for kernel, rows in [(k, n) for k in ("xla", asked.chip.kernel) for n in args.rows]:
            cells = [where, kernel, str(rows)]
            for running.GROUP in args.group:
                setting = Setting(
                    PRESETS["qwen-7b"], batch=rows, length=args.length[0], attention=kernel
                )
                program = programs.prefill(setting, mesh, chunk=WHOLE_CHUNK)
                cells.append(f"{program.memory.parts['temporaries'] / 1e6:,.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="Memory beside the cache, from the compilers.")
    parser.add_argument("--target", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "h100:1"])
    parser.add_argument("--length", nargs="+", type=int, default=[4096])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--group", nargs="+", type=int, help="layers of a program")
    parser.add_argument("--rows", nargs="+", type=int, default=[ROWS], help="with --group")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    for where in args.target:  # before any backend starts
        topology.prepare(topology.parse(where).chip.platform)
    if args.group:
        by_group(args)
        return
    print("| target | program | attention | cache | rows x slots | cache, MB | temporaries, MB |")
    print("|---|---|---|---|---|---|---|")
    for where in args.target:
        asked = topology.parse(where)
        mesh = meshes.make({}, topology.devices(asked)[:1])
        for task in args.task:
            for kernel in ("xla", asked.chip.kernel):
                for kind in (None, "int8"):
                    for length in args.length:
                        setting = Setting(
                            CONFIG, batch=ROWS, length=length, attention=kernel, cache_dtype=kind
                        )
                        program = (
                            programs.decoding(setting, mesh)
                            if task == "decode"
                            else programs.prefill(setting, mesh, chunk=CHUNK)
                        )
                        print(row(where, kernel, kind, task, program, length), flush=True)


if __name__ == "__main__":
    main()
