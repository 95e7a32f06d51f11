"""The figures of a quantisation, as lines while it runs and as a table at its end."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from qwen_jax.quantise.algorithm import Scheme
from qwen_jax.quantise.schemes import NAMES


def scheme_facts(scheme: Scheme) -> dict[str, Any]:
    """Return a scheme as JSON has it."""
    return {**dataclasses.asdict(scheme), "order": scheme.order.value}


def comparison(before: float, after: float, kl: float, targets: float) -> dict[str, Any]:
    """Return the figures of two models' predictions, from the sums of `quality.Scores`."""
    count = max(targets, 1)
    return {
        "targets": int(targets),
        "perplexity": {"before": _exp(before / count), "after": _exp(after / count)},
        "kl": kl / count,
    }


def _exp(value: float) -> float | None:
    """Return exp(value), or None where no float holds it."""
    return math.exp(value) if value < 700 else None


class Clock:
    """Says how far a run is, and how long the rest takes.

    blocks: the number of blocks.
    done: how many an earlier start has done.
    """

    def __init__(self, blocks: int, *, done: int):
        self._blocks, self._done, self._begin = blocks, done, time.monotonic()

    def line(self, number: int, figures: Mapping[str, Any]) -> str:
        """Return a line that says the errors of a block that is done, and the time that is left."""
        errors = _errors(number, figures)
        shown = ", ".join(f"{name} {errors[name]:.3g}" for name in NAMES if name in errors)
        each = (time.monotonic() - self._begin) / (number + 1 - self._done)
        left = each * (self._blocks - number - 1)
        return (
            f"block {number + 1} of {self._blocks}: {shown}; output {figures['blocks'][number]:.3g}"
            f" ({each:.1f} s a block, {_time(left)} left)"
        )


def _errors(number: int, figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the relative output error of each rounded matrix of a block, by its name."""
    found = {name: figures["layers"].get(f"layers.{number}.{name}") for name in NAMES}
    return {name: each["relative_output_error"] for name, each in found.items() if each}


def _time(seconds: float) -> str:
    """Format a duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def table(figures: Mapping[str, Any]) -> str:
    """Format the figures of a run as a text table, a line for each block."""
    names = [name.partition(".")[2] for name in NAMES]
    lines = [
        f"relative output errors ({figures['calibration_tokens']:,} tokens of calibration)",
        f"{'block':>5}" + "".join(f"{name:>10}" for name in [*names, "output"]),
    ]
    for number, after in enumerate(figures["blocks"]):
        errors = _errors(number, figures)
        cells = [*(errors.get(name) for name in NAMES), after]
        lines.append(f"{number:>5}" + "".join(f"{_cell(cell):>10}" for cell in cells))
    lines += [f"mean of all matrices: {mean_error(figures):.4g}", compared(figures)]
    return "\n".join(lines)


def mean_error(figures: Mapping[str, Any]) -> float:
    """Return the mean of the relative output errors of all rounded matrices."""
    found = [each["relative_output_error"] for each in figures["layers"].values()]
    return sum(found) / len(found)


def compared(figures: Mapping[str, Any]) -> str:
    """Return a line that compares the predictions of the two models."""
    before, after = (figures["perplexity"][key] for key in ("before", "after"))
    return (
        f"on {figures['targets']:,} tokens of {figures['compared_on']}: KL {figures['kl']:.4g}, "
        f"perplexity {_cell(before)} before, {_cell(after)} after"
    )


def _cell(value: float | None) -> str:
    """Format a figure; "-" where there is none."""
    return "-" if value is None else f"{value:.4g}"
