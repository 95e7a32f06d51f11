"""Formats perplexities by mode and length as a text table, and draws them as a plot."""

import argparse
import contextlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qwen_jax.runtime import command, paths, streams

_HIGHEST = 1e100  # matplotlib cannot extend an axis with margins that no float holds


def table(found: Mapping[str, Mapping[int, float]]) -> str:
    """Format perplexities as a text table, a line per mode and a column per row length.

    found: the perplexity by length, by mode. A cell is blank if it was not measured, "nan" if a
        cross-entropy was NaN, and "inf" if the perplexity is beyond the largest float.
    """
    lengths = sorted({length for values in found.values() for length in values})
    lines = [f"{'':<16}" + "".join(f"{length:>10,}" for length in lengths)]
    for mode, values in found.items():
        lines.append(f"{mode:<16}" + "".join(_cell(values.get(length)) for length in lengths))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: float | None) -> str:
    """Format a figure in a cell of the table; blank for None."""
    return f"{'' if value is None else command.decimals(value):>10}"


def plot(
    found: Mapping[str, Mapping[int, float]], path: Path, *, title: str = "Perplexity"
) -> None:
    """Draw perplexity over row length into the picture file `path`, with a line for each mode.

    found: the perplexity by length, by mode. NaN and what is beyond `_HIGHEST` is not drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode, values in found.items():
        heights = [x if x < _HIGHEST else math.nan for x in values.values()]
        axes.plot(list(values), heights, marker="o", label=mode)
    axes.set(xscale="log", xlabel="tokens of a row", ylabel="perplexity")
    axes.set_xticks(sorted({length for values in found.values() for length in values}))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figures = [x for values in found.values() for x in values.values() if x < _HIGHEST]
    if figures and max(figures) > 10 * min(figures):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_title(title, parse_math=False, wrap=True)
    axes.legend()
    with paths.draft(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a name, in the title
        figure.savefig(draft, dpi=150, format=_format(path))


def title_of(ckpt: str, tokens: int) -> str:
    """Return the plot's title: the end of the model's path, and the number of tokens measured."""
    name = "/".join(paths.absolute(ckpt).parts[-2:])
    return f"Perplexity of {name} over {tokens:,} tokens"


def _format(path: Path) -> str:
    """Return the picture format that the file's suffix names; "png" without a suffix."""
    return path.suffix[1:].lower() or "png"


def picture(args: argparse.Namespace) -> Path | None:
    """Return the file that the plot is to be written to; None for no plot.

    args: `plot` and `json` of the command line. A plot with the default name never replaces
    another: it gets the next free number. Called before anything is measured: raises UsageError if
    the file cannot be written.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    if args.plot is None:
        return None if args.json else _free(Path("perplexity.png"))
    path = paths.parse(args.plot)
    command.check_new("--plot", path)
    known = [name for name in FigureCanvasBase.filetypes if name != "pgf"]  # pgf needs xelatex
    if _format(path) not in known:
        raise command.UsageError(f"--plot {path}: its suffix must be one of {', '.join(known)}")
    return path


def _free(path: Path) -> Path:
    """Return `path`, or if it is taken the first free one of perplexity-2.png and so on."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not os.path.lexists(free))


@contextlib.contextmanager
def reported(
    args: argparse.Namespace, tokens: int, *, picture: Path | None
) -> Iterator[Callable[[str, int, float, float], None]]:
    """Yield a function that reports a figure: its mode, row length, perplexity and seconds.

    When the context is left, even by an error, the figures so far are written to `out`, plotted,
    and printed as a table or JSON, each even if another of the three fails.

    args: `ckpt`, `json` and `out` of the command line.
    tokens: the number of tokens measured at each length.
    picture: the plot's file, or None.
    """
    found, whole = dict[str, dict[int, float]](), False

    def facts() -> str:
        values = {  # JSON has no NaN and no infinity
            mode: {length: x if math.isfinite(x) else None for length, x in by_length.items()}
            for mode, by_length in found.items()
        }
        return json.dumps({"tokens": tokens, "perplexity": values, "complete": whole})

    def keep() -> None:
        if args.out is not None:
            paths.write(args.out, facts().encode())

    def draw() -> None:
        if picture:
            plot(found, picture, title=title_of(args.ckpt, tokens))
            command.say(f"plot: {picture}")

    def show() -> None:
        print(facts() if args.json else table(found))
        streams.flush()

    def tell(mode: str, length: int, value: float, seconds: float) -> None:
        found.setdefault(mode, {})[length] = value
        command.say(f"{mode}, {length:,} tokens: perplexity {value:.4g} ({seconds:.1f} s)")
        keep()

    command.say(f"measuring {tokens:,} tokens at each length")
    try:
        yield tell
        whole = True
    finally:
        if found:
            with contextlib.ExitStack() as last:  # the files first: stdout may be a broken pipe
                for output in (show, draw, keep):  # called in reverse, all of them
                    last.callback(output)
