"""The memory that quantised models need on one GPU, beside the figures in the original's README.

    JAX_PLATFORMS=cpu python benchmarks/quantised.py [--only qwen-7b]

The original's figures were measured on one A100-80G (the 72B in bfloat16 and Int8: two): of
generating 2,048 tokens, and of Q-LoRA on Int4 with batches of 8 rows one after the other. Ours are
the compiler's figures for the same batch, and for a prompt of 2,048 tokens, too. Rows are kept in
`--cache`. Needs the `aot` extra.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scaling
from qwen_jax.runtime import command

GENERATED = 2048  # tokens
# GB in the original's README, by model and weights.
GENERATION = {
    ("qwen-1.8b", "float"): 4.23,
    ("qwen-1.8b", "int8"): 3.48,
    ("qwen-1.8b", "int4"): 2.91,
    ("qwen-7b", "float"): 16.99,
    ("qwen-7b", "int8"): 11.20,
    ("qwen-7b", "int4"): 8.21,
    ("qwen-14b", "float"): 30.15,
    ("qwen-14b", "int8"): 18.81,
    ("qwen-14b", "int4"): 13.01,
    ("qwen-72b", "float"): 144.69,
    ("qwen-72b", "int8"): 81.27,
    ("qwen-72b", "int4"): 48.86,
}
# GB of Q-LoRA on Int4 there, at each of these lengths.
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
FINE_TUNING = {
    "qwen-1.8b": (5.8, 6.0, 6.6, 7.8, 10.2, 15.8),
    "qwen-7b": (11.5, 11.5, 12.3, 13.9, 16.9, 23.5),
    "qwen-14b": (18.7, 18.4, 18.9, 19.9, 23.0, 27.9),
    "qwen-72b": (61.4, 61.4, 62.9, 64.1, 68.0, 75.6),
}
ROWS, RANK = 8, 64  # of a batch, whose rows are computed one after the other; of the adapters
# Where one H100 is too small. Two H100 hold half of the model each.
_LARGER = {("qwen-72b", "float"): "h100:2", ("qwen-72b", "int8"): "h200:1"}


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="What quantised models take of one GPU.")
    models = tuple(FINE_TUNING)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=models, metavar="MODEL", help=", ".join(models)
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/scaling.jsonl"))
    args = parser.parse_args()
    wanted = args.only or models
    _print_head(["model", *(f"{x:,}" for x in LENGTHS)])
    for model in (x for x in models if x in wanted):
        found = (fine_tuning(model, length, cache=args.cache) for length in LENGTHS)
        cells = (_beside(x, y) for x, y in zip(found, FINE_TUNING[model], strict=True))
        print(_line([model, *cells]), flush=True)
    print()
    head = ["model", "weights", "GPUs", "weights, GB", "cache, GB", "prefill, GB", "decoding, GB"]
    head += ["original, GB"]
    _print_head(head)
    for (model, weights), theirs in GENERATION.items():
        if model in wanted:
            print(_line(_generation_row(model, weights, theirs, args.cache)), flush=True)


def fine_tuning(model: str, length: int, *, cache: Path) -> float | None:
    """GB that a step of Q-LoRA on Int4 needs; None if the compiler failed. cache: of plans."""
    options = ["--model", model, "--topology", "h100:1", "--weights", "int4"]
    options += ["--lora-rank", str(RANK), "--length", str(length)]
    options += ["--batch", str(ROWS), "--accumulate", str(ROWS), "--json"]
    found = scaling.plans(options, cache)
    return found[0]["memory"]["needed"] / 1e9 if found else None


def _generation_row(model: str, weights: str, theirs: float, cache: Path) -> list[str]:
    """A row of the table of generation, with sums over the GPUs. cache: of plans."""
    topology = _LARGER.get((model, weights), "h100:1")
    options = ["--model", model, "--topology", topology, "--weights", weights]
    options += ["--decode", "--length", str(GENERATED), "--batch", "1", "--json"]
    found = scaling.plans(options, cache)
    if not found:
        return [model, weights, topology, "the compiler failed"]
    prefill, decoding = ({**x["memory"], "GPUs": x["devices"]} for x in found)
    parts = (decoding, "weights"), (decoding, "cache"), (prefill, "needed"), (decoding, "needed")
    sizes = [f"{memory['GPUs'] * memory[name] / 1e9:.2f}" for memory, name in parts]
    return [model, weights, topology, *sizes, f"{theirs:.2f}"]


def _beside(ours: float | None, theirs: float) -> str:
    """Our figure and theirs."""
    return f"{'failed' if ours is None else f'{ours:.1f}'} / {theirs:.1f}"


def _print_head(names: Sequence[str]) -> None:
    """Print the head of a table."""
    print(f"{_line(names)}\n|{'---|' * len(names)}")


def _line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
