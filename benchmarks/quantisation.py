"""Times the quantisation of a block of a published size, by the code that a whole model takes.

    python benchmarks/quantisation.py --preset qwen-1.8b --rows 4 --length 512

A checkpoint of random weights with two blocks of that width and a small vocabulary is quantised on
rows of random tokens. The first block also compiles its programs; the second is what the others of
a model take, which the table has: seconds, CPU seconds of all threads, which other programs on the
machine change less, and the most memory that the process has taken.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import section
from convert import from_hf
from qwen_jax import meshes
from qwen_jax.quantise import calibration
from qwen_jax.quantise.algorithm import Order, Scheme
from qwen_jax.quantise.output import Output
from qwen_jax.quantise.run import Settings, run
from qwen_jax.runtime import caches, command
from tests.tools.make_checkpoint import PRESETS, make_checkpoint

VOCABULARY = 1280
COLUMNS = ("model", "bits", "tokens", "seconds of a block", "CPU seconds", "memory")


def parser() -> command.Parser:
    """The options."""
    result = command.Parser(description="Time of the quantisation of a block.")
    add = result.add_argument
    add("--preset", choices=PRESETS, default="qwen-1.8b", help="whose width, heads and inner width")
    add("--bits", type=int, choices=(4, 8), default=4)
    add("--group-size", type=int, default=128)
    add("--rows", type=command.positive, default=4, help="rows of calibration")
    add("--length", type=command.positive, default=512, help="tokens of a row")
    add("--out", type=Path, help="write the table, as Markdown")
    caches.add_compilation_cache(result)
    return result


def measure(
    ckpt: Path, out: Path, scheme: Scheme, *, rows: int, length: int
) -> tuple[float, float]:
    """Quantise a model of two blocks; return the seconds and CPU seconds of the second."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (rows, length))
    marks: list[tuple[float, float]] = []
    note = Output.note

    def marked(self: Output, figures: Mapping[str, Any]) -> None:
        note(self, figures)
        marks.append((time.monotonic(), time.process_time()))

    with mock.patch.object(Output, "note", marked), meshes.entered(meshes.make()):
        run(Settings(ckpt, out, scheme), calibration.of_tokens(tokens), held_out=None)
    (wall, cpu), (wall_after, cpu_after) = marks[:2]
    return wall_after - wall, cpu_after - cpu


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    args = parser().parse_args(argv)
    caches.use_compilation_cache(args.compilation_cache)
    config = PRESETS[args.preset] | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
    scheme = Scheme(args.bits, args.group_size, order=Order.GROUPS)
    with tempfile.TemporaryDirectory() as name:
        ckpt = Path(name) / "floats"
        make_checkpoint(Path(name) / "hf", config)
        assert from_hf.main([str(Path(name) / "hf"), str(ckpt)]) == 0
        wall, cpu = measure(ckpt, Path(name) / "out", scheme, rows=args.rows, length=args.length)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tokens = f"{args.rows * args.length:,}"
    line = [args.preset, str(args.bits), tokens, f"{wall:.0f}", f"{cpu:.0f}", f"{most:.1f} GiB"]
    title = section.title("quantisation.py", sys.argv[1:] if argv is None else argv)
    print(section.text(title, COLUMNS, [line]))
    section.write(args.out, title, COLUMNS, [line])
    return 0


if __name__ == "__main__":
    sys.exit(main())
