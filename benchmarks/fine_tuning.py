"""The memory that fine-tuning needs on one GPU, beside the figures in the original's README.

    JAX_PLATFORMS=cpu python benchmarks/fine_tuning.py > table.md

The original's figures are for one A100-80G (7B, all weights: two), batches of 8 rows one after the
other, PyTorch with DeepSpeed ZeRO-2; its Q-LoRA is on Int4 weights. Ours are the compiler's figures
for a device and the same batch. Rows are kept in `--cache`. Needs the `aot` extra.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scaling
from qwen_jax.meshes import hardware
from qwen_jax.runtime import command

LENGTHS = (256, 8192)
LORA, EMBEDDINGS, INT8, WHOLE = "LoRA", "LoRA, embeddings trained", "LoRA on int8", "all weights"
OPTIONS = {
    LORA: ["--lora-rank", "64"],
    EMBEDDINGS: ["--lora-rank", "64", "--train-embeddings"],
    INT8: ["--lora-rank", "64", "--base-dtype", "int8"],
    WHOLE: [],
}
# GB at 256 and at 8192 tokens in the original's README; None if it has no figure.
THEIRS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("qwen-1.8b", LORA): (6.7, 21.8),
    ("qwen-1.8b", EMBEDDINGS): (13.7, 27.7),
    ("qwen-1.8b", INT8): (5.8, 15.8),
    ("qwen-1.8b", WHOLE): (43.5, 48.3),
    ("qwen-7b", LORA): (20.1, 36.6),
    ("qwen-7b", EMBEDDINGS): (33.7, 48.5),
    ("qwen-7b", INT8): (11.5, 23.5),
    ("qwen-7b", WHOLE): (139.2, None),
    ("qwen-14b", LORA): (34.6, 55.2),
    ("qwen-14b", EMBEDDINGS): (51.2, 67.7),
    ("qwen-14b", INT8): (18.7, 27.9),
    ("qwen-72b", INT8): (61.4, 75.6),
}
MODELS = tuple(dict.fromkeys(model for model, _ in THEIRS))


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="What fine-tuning takes of one GPU.")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=MODELS, metavar="MODEL", help=", ".join(MODELS)
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/scaling.jsonl"))
    args = parser.parse_args()
    names = ["model", "trained", "tokens", "GB", "original, GB", "80 GB", "141 GB"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for (model, what), theirs in THEIRS.items():
        if args.only and model not in args.only:
            continue
        for length, their in zip(LENGTHS, theirs, strict=True):
            options = ["--model", model, "--length", str(length), "--batch", "8", *OPTIONS[what]]
            options += ["--topology", "h200:1", "--accumulate", "8", "--json"]
            found = scaling.plans(options, args.cache)
            print(_row(model, what, length, their, found), flush=True)


def _row(model: str, what: str, length: int, theirs: float | None, found: list[Any]) -> str:
    """A line of the table. theirs: the original's GB; found: the plans, of which there may
    be none.
    """
    cells = [model, what, f"{length:,}"]
    if not found:
        return f"| {' | '.join(cells)} | the compiler failed |"
    needed = found[0]["memory"]["needed"]
    cells += [f"{needed / 1e9:.1f}", "" if theirs is None else f"{theirs:.1f}"]
    for available in (hardware.CHIPS[name].usable for name in ("h100", "h200")):
        cells.append("fits" if needed <= available else f"{(needed - available) / 1e9:.1f} over")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
