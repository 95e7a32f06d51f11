"""Writes the outputs of a run while it trains: progress bar, metrics.jsonl and TensorBoard events.

Only process 0 writes. `metrics.jsonl` has a line for each step and evaluation; a resumed run
removes the lines after its checkpoint, so that no step appears twice. Objects in `gs://` cannot be
appended to, so a run in `gs://` writes local files, and uploads them whole from time to time.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from qwen_jax.runtime import paths, processes, progress

METRICS, EVENTS = "metrics.jsonl", "events"
TRAIN, HELD_OUT = "train", "held_out"
# Uploads to a remote folder are at least _EVERY seconds apart, and take at most one part in _SHARE
# of the time.
_EVERY, _SHARE = 60, 100


class Log:
    """The log of one run.

    folder: the folder of the run.
    step: the number of updates taken before.
    steps: the number of updates in the whole run.
    evaluation_due: whether the evaluation after step `step` was cut off and is still to be done.
    """

    def __init__(self, folder: Path, step: int, *, steps: int, evaluation_due: bool = False):
        self._on = processes.index() == 0
        self._bar = progress.bar(
            desc="train",
            total=steps,
            initial=step,
            unit="step",
            smoothing=0.05,
            disable=not self._on,
        )
        if not self._on:
            return
        self._folder = folder
        self._local = Path(tempfile.mkdtemp()) if paths.is_remote(folder) else folder
        self._uploaded, self._took = time.monotonic(), 0.0
        paths.make_folder(self._local)
        with paths.draft(self._local / METRICS) as draft, open(draft, "wb") as kept:
            for line in _lines(folder / METRICS):
                if _place(line) <= (step, not evaluation_due):
                    kept.write(line.rstrip(b"\n") + b"\n")
        metrics = self._local / METRICS
        self._file = open(metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (`close` does it)
        self._events = SummaryWriter(str(self._local / EVENTS), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float], *, prefix: str = TRAIN) -> None:
        """Log a step's figures by name; in metrics.jsonl, NaN and infinity become null."""
        if not self._on:
            return
        known = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        self._file.write(json.dumps({"step": step, "of": prefix, **known}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(f"{prefix}/{name}", value, step)
        if time.monotonic() - self._uploaded > max(_EVERY, _SHARE * self._took):
            self.upload()

    def upload(self) -> None:
        """Copy the log to the run's folder if that is remote."""
        if not self._on or self._local == self._folder:
            return
        begin = time.monotonic()
        self._events.flush()
        paths.upload_folder(self._local, self._folder)
        self._uploaded = time.monotonic()
        self._took = self._uploaded - begin

    def show(self, step: int, **figures: str) -> None:
        """Move the progress bar to `step`, and show these figures beside it."""
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """End the progress bar and close the files, after a last upload."""
        self._bar.close()
        if self._on:
            self._file.close()
            self._events.close()
            self.upload()
            if self._local != self._folder:
                paths.remove_tree(self._local)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; none if it does not exist."""
    if path.exists():
        with paths.open_binary(path) as file:
            yield from file


def _place(line: bytes) -> tuple[int, bool]:
    """Return the step of a line of metrics.jsonl, and whether the line is of an evaluation.

    An incomplete line gets a step so large that the line is never kept.
    """
    try:
        figures = json.loads(line)
        return int(figures["step"]), figures["of"] != TRAIN
    except (ValueError, KeyError, TypeError):
        return 2**62, True
