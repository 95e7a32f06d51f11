"""The training step of a pod, compiled on a machine without one: beside MaxText's, and by size.

    JAX_PLATFORMS=cpu python benchmarks/pod.py peer      temporary memory beside MaxText's
    JAX_PLATFORMS=cpu python benchmarks/pod.py depth     compile time and memory by layers
    JAX_PLATFORMS=cpu python benchmarks/pod.py width     memory by chips, at 1 row a chip

Prints Markdown tables. Every row has a process of its own, so that no row finds what another one
has compiled. Needs the `aot` extra.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.runtime import command
from train.planning import topology as topologies

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to compile. batch: rows over all devices; layers: None is the model's own
    number.
    """

    model: str
    topology: str
    mesh: str
    batch: int
    length: int
    sequence_parallel: bool = False
    layers: int | None = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """The needs of MaxText e591f30 `train_compile` at the same shapes.

    Measured with remat_policy=full, AdamW, jax 0.10.2, libtpu 0.0.51, 2 cores. arguments,
    temporary: bytes per device; seconds: of the whole command.
    """

    arguments: float
    temporary: float
    seconds: float


PEERS = {
    Case("qwen-7b", "v5p:4x4x8", "fsdp=128", 4 * 128, 2048): Peer(0.73e9, 8.70e9, 42),
    Case("qwen-7b", "v5e:16x16", "fsdp=256", 2 * 256, 2048): Peer(0.37e9, 4.98e9, 44),
    Case("qwen-72b", "v5p:8x8x8", "fsdp=512", 512, 4096): Peer(1.73e9, 10.86e9, 41),
    Case("qwen-72b", "v5p:8x8x8", "fsdp=64,tp=8", 512, 4096, True): Peer(1.70e9, 10.79e9, 37),
}
DEPTHS = [Case("qwen-7b", "v5e:8x8", "fsdp=64", 64, 2048, layers=n) for n in (2, 8, 32, 64)]
WIDTHS = [
    Case("qwen-7b", "v5e:4x4", "fsdp=16", 16, 2048),
    Case("qwen-7b", "v5e:8x8", "fsdp=64", 64, 2048),
    Case("qwen-7b", "v5e:16x16", "fsdp=256", 256, 2048),
    Case("qwen-7b", "v5p:8x8x8", "fsdp=512", 512, 2048),
]


def compiled(case: Case) -> dict[str, float]:
    """Compile a step: bytes per device, and seconds (wall time of compiling, and of all cores)."""
    topologies.prepare("tpu")
    from qwen_jax import PRESETS, meshes
    from train.planning import programs

    config = PRESETS[case.model]
    if case.layers is not None:
        config = dataclasses.replace(config, num_layers=case.layers)
    topology = topologies.parse(case.topology)
    mesh = topologies.mesh(topology, meshes.parse(case.mesh))
    parallel = case.sequence_parallel
    setting = programs.Setting(
        config,
        batch=case.batch,
        length=case.length,
        attention="pallas_tpu",
        sequence_parallel=parallel,
    )
    cores = time.process_time()
    program = programs.training(setting, mesh)
    parts = program.memory.parts
    held = sum(parts[name] for name in ("weights", "optimiser", "batch", "padding"))
    of_layers = config.num_params() - (2 * config.vocab_size + 1) * config.hidden_size
    return {
        "arguments": held,
        "residuals": parts["residuals"],
        # For its part of the weights, a device holds float32 gradients and, of the layers, a
        # bfloat16 copy.
        "copies": (4 * config.num_params() + 2 * of_layers) / mesh.size,
        "temporary": parts["residuals"] + parts["temporaries"],
        "seconds": program.seconds,
        "core_seconds": time.process_time() - cores,
    }


def apart(case: Case) -> dict[str, float]:
    """`compiled` in a process of its own; `wall` is the wall time of the whole process."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{case}: {ran.stderr.strip()[-400:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return {**found, "wall": time.perf_counter() - started}


def peer() -> None:
    """Print the comparison with MaxText."""
    print(
        "| model, chips, mesh, rows | arguments, GB | temporary, GB | of MaxText's | s, cores | s |"
    )
    print("|---|---|---|---|---|---|")
    for case, other in PEERS.items():
        ours = apart(case)
        print(
            f"| {case.model}, {case.topology}, {case.mesh}, {case.batch} x {case.length}"
            f" | {ours['arguments'] / GB:.2f} / {other.arguments / GB:.2f}"
            f" | {ours['temporary'] / GB:.2f} / {other.temporary / GB:.2f}"
            f" | {ours['temporary'] / other.temporary:.2f}"
            f" | {ours['core_seconds']:.0f} | {ours['wall']:.0f} / {other.seconds:.0f} |",
            flush=True,
        )


def table(cases: list[Case]) -> None:
    """Print a table of these cases."""
    head = (
        "| model, layers | chips, mesh | rows | residuals, GB | gradients and bf16 weights, GB "
        "| other temporary, GB | s, cores |"
    )
    print(f"{head}\n{'|---' * 7}|")
    for case in cases:
        ours = apart(case)
        rest = ours["temporary"] - ours["residuals"] - ours["copies"]
        print(
            f"| {case.model}, {case.layers or 'all'} | {case.topology}, {case.mesh}"
            f" | {case.batch} x {case.length} | {ours['residuals'] / GB:.3f}"
            f" | {ours['copies'] / GB:.3f} | {rest / GB:.3f} | {ours['core_seconds']:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run the command."""
    parser = command.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("peer", "depth", "width"), default="peer")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.case:
        print(json.dumps(compiled(Case(**json.loads(args.case)))))
    elif args.what == "peer":
        peer()
    else:
        table(DEPTHS if args.what == "depth" else WIDTHS)


if __name__ == "__main__":
    main()
