"""Measures a model's perplexity on long text: `python train/perplexity.py`.

Prints a table by row length and context extension, as table 3 of Qwen's report, and writes a plot.
Every length uses the same tokens, cut into rows of that length, so that figures differ only by the
context before each token. Each figure is reported as soon as it is measured; after an interruption
or error, the table and plot show the figures measured so far.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.runtime import caches, command
from train.measuring import figures
from train.measuring.modes import MODES, OWN

_EXAMPLES = """examples:
  python train/perplexity.py --ckpt DIR --data book.txt --lengths 1024,2048,4096,8192
  python train/perplexity.py --ckpt DIR --data papers.jsonl --modes plain,ntk+logn --plot ppl.png
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    result = command.Parser(
        prog="python train/perplexity.py",
        description="Measure how well a model predicts long text (its perplexity), for several row "
        "lengths and ways\nto extend the context. Prints a table, and writes a plot; after an "
        "interruption, of what was\nmeasured until then.",
        epilog=_EXAMPLES,
    )
    _data_options(result)
    _measure_options(result)
    _output_options(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def _data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model and the text."""
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="model directory (required)")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files of text to predict (required): JSONL, JSON, Parquet, or text, which is one "
        "document; documents shorter than the longest row are left out",
    )
    add(
        "--field",
        type=command.text,
        default="text",
        metavar="NAME",
        help="field of a record that holds its text (default: %(default)s)",
    )
    add(
        "--tokens",
        type=command.positive,
        default=2**18,
        metavar="N",
        help="measure N tokens, or all if there are fewer, the same ones at each length; N must be "
        "at least the longest of --lengths (default: %(default)s)",
    )


def _measure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured, and how it is computed."""
    add = parser.add_argument
    add(
        "--lengths",
        default="1024,2048,4096,8192,16384,32768",
        metavar="N,...",
        help="tokens per row, all divisors of the longest (default: %(default)s)",
    )
    add(
        "--modes",
        default=",".join(MODES),
        metavar="NAME,...",
        help="context extensions to compare: plain (none), ntk, ntk+logn, ntk+logn+window, or own "
        "(as config.json says) (default: %(default)s)",
    )
    add(
        "--windows",
        metavar="LIST",
        help="attention windows of ntk+logn+window, in tokens: a JSON list with an entry for each "
        "layer, such as [1024, null]; null: no window (default: seq_length in the lower half of "
        "the layers, which is our choice, as Qwen has published none)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=command.DTYPE)
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help=f"implementation of attention: {command.ATTENTION} (default: %(default)s)",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp, context and tp, such as context=8 (default: one device)",
    )


def _output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the table, the plot and the file of figures."""
    add = parser.add_argument
    add(
        "--plot",
        metavar="FILE",
        help="picture file to write the plot to; must not exist yet (default: perplexity.png, or "
        "perplexity-2.png and so on if that exists; none with --json)",
    )
    add("--json", action="store_true", help="print a JSON object in place of the table")
    add(
        "--out",
        type=command.path,
        metavar="FILE",
        help="JSON file to write the figures to, after each measurement; must not exist yet "
        "(default: none)",
    )


def work(args: argparse.Namespace) -> None:
    """Measure perplexities as the command line says, and print and write them.

    Raises UsageError, before jax is loaded, for options that cannot be combined.
    """
    lengths, chosen, windows = _numbers(args.lengths), _modes(args), _windows(args.windows)
    if args.tokens < max(lengths):
        raise command.UsageError(
            f"--tokens {args.tokens}: must be at least {max(lengths)}, the longest of --lengths"
        )
    picture = figures.picture(args)
    if args.out is not None:
        command.check_new("--out", args.out)
        if picture is not None and os.path.realpath(args.out) == os.path.realpath(picture):
            raise command.UsageError(f"--out {args.out}: is the file of the plot: name another")
    from train.measuring import measure

    measure.run(args, lengths, modes=chosen, windows=windows, picture=picture)


def _modes(args: argparse.Namespace) -> list[str]:
    """Return the modes to measure.

    Raises UsageError for an unknown mode, and for --windows if no mode has windows.
    """
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in (*MODES, OWN)]:
        known = ", ".join((*MODES, OWN))
        raise command.UsageError(f"--modes {unknown[0]}: must be one or more of {known}")
    if not any("window" in mode.split("+") for mode in modes):
        how = "applies only to mode ntk+logn+window: leave it out, or add that to --modes"
        command.refuse(args, ("windows",), why=how)
    return modes


def _windows(text: str | None) -> list[int | None] | None:
    """Parse --windows, a JSON list; None if it is not given. Raises UsageError for other JSON."""
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = text
    if found is None or isinstance(found, list):
        return found
    how = "must be a JSON list of a number or null for each layer, such as [1024, null]"
    raise command.UsageError(f"--windows {text}: {how}")


def _numbers(text: str) -> list[int]:
    """Parse --lengths into numbers in ascending order, all divisors of the last.

    Raises UsageError for any other text.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    longest = max(found, default=0)
    if not found or any(length < 2 or longest % length for length in found):
        how = "must be whole numbers from 2 on that divide the longest, such as 1024,2048"
        raise command.UsageError(f"--lengths {text}: {how}")
    return sorted(set(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return command.run(parser(), work, argv=None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
