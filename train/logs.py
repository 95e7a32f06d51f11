"""What a run tells while it goes on: a progress line, lines of figures, TensorBoard's events.

Process 0 alone tells. `metrics.jsonl` has a line for each step and evaluation; a run that resumes
cuts off what comes after its checkpoint, so that no step is there twice.
"""

import json
import math
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from qwen_jax import paths, processes

METRICS, EVENTS = "metrics.jsonl", "events"
TRAIN, HELD_OUT = "train", "held_out"


class Log:
    """folder: a local one. step: updates made so far, of `steps`. owed: whether an evaluation after
    the last of them is still to come.
    """

    def __init__(self, folder: Path, step: int, steps: int, owed: bool = False):
        self._on = processes.index() == 0
        self._bar = tqdm(
            desc="train",
            total=steps,
            initial=step,
            unit="step",
            mininterval=0.5,
            smoothing=0.05,
            disable=not self._on,
        )
        if not self._on:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        lines = (
            path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        )
        told = [(_place(line), line) for line in lines]
        kept = [line for place, line in told if place <= (step, not owed)]
        paths.write(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=step + 1)

    def tell(self, step: int, figures: dict[str, float], prefix: str = TRAIN) -> None:
        """Figures of a step by name; what is no number is null."""
        if not self._on:
            return
        known = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        self._file.write(json.dumps({"step": step, "of": prefix, **known}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(f"{prefix}/{name}", value, step)

    def show(self, step: int, **figures: Any) -> None:
        """Move the progress line on."""
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
        if self._on:
            self._file.close()
            self._events.close()


def _place(line: str) -> tuple[int, bool]:
    """The step of a line, and whether it is of an evaluation after it. Of a line that was cut
    short: one that is never kept.
    """
    try:
        figures = json.loads(line)
        return int(figures["step"]), figures["of"] != TRAIN
    except (ValueError, KeyError, TypeError):
        return 2**62, True
