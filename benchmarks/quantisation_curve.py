"""Measures the perplexity of the model of examples/moby_dick against the bits of its weights.

    python benchmarks/quantisation_curve.py [--plot FILE] [--out FILE] [--rows 64]

Each model is made with GPTQ as `python -m qwen_jax.quantise` does, calibrated on rows of 256 tokens
of chapters that the model was trained on, and measured on all rows of the chapters that its
training held out. Mixtures have some matrices in 8 bits and the others in 4. Bits are the mean over
the weights of the layers' matrices, with the float16 scale of each group of 32; the embedding and
the head are floats.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import section
from convert import from_hf
from qwen_jax import checkpoint, meshes
from qwen_jax.quantise import calibration
from qwen_jax.quantise.algorithm import Order, Scheme
from qwen_jax.quantise.calibration import Rows
from qwen_jax.quantise.run import Settings, run
from qwen_jax.runtime import command, paths, records
from train.data import packing

HOME = Path(__file__).resolve().parent.parent / "examples" / "moby_dick"
LENGTH = 256
GROUP = 32  # inputs, of 128 and 352
SHARE = 0.05  # of the chapters, held out as in train.sh
# By name: the bits of all matrices, and the patterns of those that have 8.
POINTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "8": (8, ()),
    "4, feed-forward 8": (4, ("*.ffn.*",)),
    "4, last half of the blocks 8": (4, tuple(f"layers.{i}.*" for i in (3, 4, 5))),
    "4, first half of the blocks 8": (4, tuple(f"layers.{i}.*" for i in (0, 1, 2))),
    "4, attention 8": (4, ("*.attn.*",)),
    "4, ffn.down 8": (4, ("*.ffn.down",)),
    "4, first block 8": (4, ("layers.0.*",)),
    "4": (4, ()),
}
COLUMNS = ("bits", "with scales", "KL", "perplexity", "change")


def parser() -> command.Parser:
    """The options."""
    result = command.Parser(description="Perplexity against the bits of weights.")
    result.add_argument("--points", nargs="+", default=list(POINTS), choices=POINTS, metavar="NAME")
    result.add_argument("--rows", type=command.positive, default=64, help="rows of calibration")
    result.add_argument("--held-out", type=command.positive, default=10**6, help="rows at most")
    result.add_argument("--plot", type=Path, help="write a picture")
    result.add_argument("--out", type=Path, help="write the table, as Markdown")
    return result


def read(ckpt: Path, folder: Path, *, rows: int, held_out: int) -> tuple[Rows, Rows]:
    """Return the rows of calibration, and those of the chapters that training held out."""
    tokenizer = checkpoint.load_tokenizer(ckpt)
    assert tokenizer is not None
    chapters = [record.value for record in records.read(HOME / "moby_dick.jsonl")]
    found = []
    for part, most in zip(
        packing.split(len(chapters), SHARE, seed=0), (rows, held_out), strict=True
    ):
        file = folder / f"{len(found)}.jsonl"
        file.write_text("".join(f"{json.dumps(chapters[i])}\n" for i in part))
        found.append(calibration.read([file], tokenizer, length=LENGTH, least=1, most=most, seed=0))
    return found[0], found[1]


def bits_with_scales(figures: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> float:
    """Return the mean bits of a weight of the matrices that were rounded, scales included.

    figures: those of `run`. shapes: that of each float weight, by path.
    """
    weights = {path: shapes[path][0] * shapes[path][1] for path in figures["layers"]}
    bits = sum(count * figures["layers"][path]["bits"] for path, count in weights.items())
    return bits / sum(weights.values()) + 16 / GROUP


def plot(floats: float, points: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Draw perplexity against bits into a picture file.

    The line joins the models than which none of fewer bits is better.

    floats: the perplexity of the float model. points: bits and perplexity by name.
    """
    from matplotlib.figure import Figure

    ordered = sorted(points.values())
    best = [
        at for i, at in enumerate(ordered) if at[1] < min((y for _, y in ordered[:i]), default=1e9)
    ]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(floats, color="grey", linestyle="--", label=f"floats: {floats:.2f}")
    axes.plot(*zip(*best, strict=True), color="C0", label="best for their bits")
    axes.scatter(*zip(*ordered, strict=True), color="C0")
    for name, at in points.items():
        axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="bits of a weight, scales included", ylabel="perplexity")
    axes.set_xlim(4.2, 9)
    axes.grid(alpha=0.3)
    axes.legend()
    with paths.draft(path) as draft:
        figure.savefig(draft, dpi=100, format=path.suffix[1:] or "png")


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    args = parser().parse_args(argv)
    lines: list[list[str]] = []
    points: dict[str, tuple[float, float]] = {}
    title = section.title("quantisation_curve.py", sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as name, meshes.entered(meshes.make()):
        folder = Path(name)
        ckpt = folder / "floats"
        assert from_hf.main([str(HOME / "model"), str(ckpt), "--dtype", "float32"]) == 0
        shapes = json.loads((ckpt / "manifest.json").read_text())["shapes"]
        rows, held_out = read(ckpt, folder, rows=args.rows, held_out=args.held_out)
        for number, point in enumerate(args.points):
            bits, patterns = POINTS[point]
            scheme = Scheme(bits, GROUP, order=Order.GROUPS)
            settings = Settings(
                ckpt, folder / f"{number}.out", scheme, bits_of=dict.fromkeys(patterns, 8)
            )
            found = run(settings, rows, held_out=held_out)
            before, after = (found["perplexity"][key] for key in ("before", "after"))
            if not lines:
                lines.append(["16 (floats)", "16", "", f"{before:.3f}", ""])
            stored = bits_with_scales(found, shapes)
            points[point] = stored, after
            change = f"{100 * (after / before - 1):+.2f} %"
            lines.append([point, f"{stored:.2f}", f"{found['kl']:.2g}", f"{after:.3f}", change])
            section.write(args.out, title, COLUMNS, lines)
    print(section.text(title, COLUMNS, lines))
    if args.plot:
        plot(before, points, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
