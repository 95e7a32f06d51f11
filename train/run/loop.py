"""The training loop: runs steps, logs and evaluates them, saves checkpoints, and stops on a signal.

A step's report is read only when later steps are under way, so that the device never waits for the
host. Knows no recipe and no model.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_jax.meshes import hardware, moves
from qwen_jax.runtime import command, paths, processes
from train.data.batches import Batches, once
from train.data.packing import Rows
from train.run.checkpoints import Checkpoints
from train.run.logs import HELD_OUT, Log
from train.run.run_folder import CHECKPOINTS
from train.step import State

_IN_FLIGHT = 2  # steps that are under way while the next is prepared
_SKIPPED = 10  # batches in a row without a number: it is not the batches
_NOTICE = 2 * _IN_FLIGHT + 2  # steps from a signal to the end, so that every process hears of it


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run besides its recipe: its folder, and when to evaluate, save and stop.

    Only on_nan changes what is computed: "stop", or "skip" the batch. evaluate, save: the interval
    in steps; both also happen at the end, and with 0 only then. keep_last, keep_best: the number of
    checkpoints to keep; keep_best evaluates before every save. profile: the first and last step to
    profile. merge: write the model with its adapters merged at the end. token_cache: the folder of
    encoded data, None for the default.
    """

    out: Path
    evaluate: int = 500
    save: int = 500
    keep_last: int = 2
    keep_best: int = 1
    resume: bool = False
    on_nan: str = "stop"
    profile: tuple[int, int] | None = None
    merge: bool = False
    token_cache: Path | None = None


class NotANumber(ValueError):
    """A loss or gradient was NaN or infinite; its batch and the last good state have been saved."""


@dataclasses.dataclass
class Loop:
    """The training loop with all that it uses: log, evaluation, checkpoints and signals.

    run, evaluate: the results of `step.make_step` and `make_evaluation`. base: the frozen weights
    that both take. held_out_rows: rows evaluated at a time. check: the function that
    `run_folder.alone` yields. steps: of the whole run; position: steps taken so far. tokens: per
    batch, without padding; flops: per token. owed: whether a signal cut off the evaluation at
    `position`, which is still to do.
    """

    settings: Settings
    run: Any
    evaluate: Any
    base: Any
    batches: Batches
    held_out: Rows | None
    held_out_rows: int
    checkpoints: Checkpoints
    check: Callable[[], None]
    log: Log
    steps: int
    position: int
    tokens: float
    flops: float
    owed: bool = False
    _skipped: int = 0
    _waiting: collections.deque[tuple[int, Any, Any]] = dataclasses.field(
        default_factory=collections.deque
    )
    _told: float = dataclasses.field(default_factory=time.perf_counter)

    def go(self, state: State, asked: dict[str, Any]) -> State:
        """Run steps to the end, or until all processes know of a signal; return the last state."""
        settings, end = self.settings, self.steps
        so_far = moves.place(np.array(True), "")
        if self.owed:
            self._evaluated(state, asked)
            end = self.position if self.owed else end
        with _profile(settings) as profiled:
            while self.position < end:
                profiled(self.position, functools.partial(self._all_heard, state))
                if "signal" in asked and "at" not in asked:
                    notice = _NOTICE if processes.count() > 1 else 1
                    asked["at"] = processes.propose(self.position + notice)
                end = min(end, asked.get("at") or processes.proposed() or end)
                batch = next(self.batches)
                state, report = self.run(state, batch, self.base, so_far)
                so_far = report.finite if settings.on_nan == "stop" else so_far
                self.position += 1
                self._waiting.append((self.position, batch, report))
                while len(self._waiting) > _IN_FLIGHT:
                    self._hear(state)
                evaluated = None
                wanted = _due(self.position, settings.evaluate) or self.position == self.steps
                # What all processes know, not what one has heard: they evaluate together.
                if wanted or (settings.keep_best and _due(self.position, settings.save)):
                    evaluated = self._evaluated(state, asked)
                    end = self.position if self.owed else end
                if _due(self.position, settings.save) or self.position == end:
                    self._all_heard(state)
                    self._save(self.position, state, loss=evaluated)
            self._all_heard(state)
        return state

    def _save(self, position: int, state: State, *, loss: float | None = None) -> None:
        self.check()
        self.log.keep()  # before what goes on from them
        facts = {"position": position, "owed": self.owed}
        self.checkpoints.save(position, state, facts=facts, loss=loss)

    def stopped(self, asked: dict[str, Any]) -> bool:
        """Whether any process got a signal, even after its last step. All processes call this."""
        heard = "signal" in asked
        if heard:
            processes.propose(self.position)
        processes.barrier()
        return heard or processes.proposed() is not None

    def _all_heard(self, state: State) -> None:
        while self._waiting:
            self._hear(state)

    def _hear(self, state: State) -> None:
        """Wait for the oldest step in flight and log its report. state: after the newest step."""
        number, batch, report = self._waiting.popleft()
        report = jax.device_get(report)
        self._skipped = 0 if report.finite else self._skipped + 1
        if self._skipped:
            self._not_a_number(number, batch, report=report, state=state)
        now = time.perf_counter()
        seconds, self._told = now - self._told, now
        rate = self.tokens / seconds
        figures = {
            "loss": float(report.metrics.loss),
            "accuracy": float(report.metrics.accuracy),
            "gradient_norm": float(report.gradient_norm),
            "learning_rate": float(report.learning_rate),
            "targets": float(report.metrics.targets),
            "tokens_per_second": rate,
        }
        if peak := _peak():
            figures["mfu"] = rate * self.flops / peak
        if memory := _memory():
            figures["memory_gb"] = memory / 1e9
        self.log.tell(number, figures)
        shown = {"loss": f"{figures['loss']:.3f}", "tok/s": f"{rate:,.0f}"}
        shown |= {"mfu": f"{figures['mfu']:.0%}"} if "mfu" in figures else {}
        self.log.show(number, **shown)

    def _not_a_number(self, number: int, batch: Any, *, report: Any, state: State) -> None:
        path = self.settings.out / f"batch-{number}.npz"
        whole: dict[str, Any] = {
            field.name: moves.fetch(getattr(batch, field.name))
            for field in dataclasses.fields(batch)
        }
        if processes.index() == 0:
            with paths.draft(path) as draft, open(draft, "wb") as file:
                np.savez(file, **whole)
        what = f"step {number}: loss {report.metrics.loss}, gradient norm {report.gradient_norm}"
        if self._skipped >= _SKIPPED:
            saved = self._save_good(self.position, state)
            raise NotANumber(
                f"{what}, as in the {_SKIPPED - 1} steps before, whose batches are beside {path}; "
                f"{saved}: lower --learning-rate in a new run, or go on from an earlier checkpoint"
            )
        if self.settings.on_nan == "skip":
            command.say(f"{what}: skipped, its batch is in {path}")
            return
        saved = self._save_good(number - 1, state)  # no step after it has changed anything
        raise NotANumber(
            f"{what}; the batch is in {path}; {saved}: --resume goes on from there, with "
            "--on-nan skip without this batch"
        )

    def _save_good(self, position: int, state: State) -> str:
        """Save a state that no NaN or infinite step has changed; return where, for a message."""
        if position == 0:
            return "no step was taken before it"
        self._save(position, state)
        return f"the state after step {position} is in {self.settings.out / CHECKPOINTS}"

    def _evaluated(self, state: State, asked: dict[str, Any]) -> float | None:
        """Return the mean held-out loss, and log it. With one process, a signal cuts the evaluation
        off: the result is None, and `owed` is set. Several processes evaluate together to the end.
        """
        if self.held_out is None:
            return None
        self._all_heard(state)
        sums = np.zeros(3)
        for batch in once(self.held_out, self.held_out_rows):
            self.owed = "signal" in asked and processes.count() == 1
            if self.owed:
                return None
            metrics = jax.device_get(self.evaluate(state.weights, batch, self.base))
            sums += metrics.targets * np.array([metrics.loss, metrics.accuracy, 1])
        loss, accuracy = sums[:2] / max(1.0, sums[2])
        perplexity = math.exp(min(loss, 700))
        figures = {"loss": loss, "accuracy": accuracy, "perplexity": perplexity}
        self.log.tell(self.position, figures, prefix=HELD_OUT)
        where = f"step {self.position}"
        command.say(f"{where}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}")
        self._told = time.perf_counter()
        return float(loss)


@contextlib.contextmanager
def signals() -> Iterator[dict[str, Any]]:
    """Catch SIGTERM and Ctrl-C: yields a dict whose "signal" is set, so that the loop saves and
    stops. A second Ctrl-C ends the process at once, whatever it does.
    """
    asked: dict[str, Any] = {}

    def hear(number: int, _: Any) -> None:
        if asked.get("signal") == number == signal.SIGINT:
            if processes.count() > 1:
                raise KeyboardInterrupt  # the others learn of it
            command.say("interrupted; what was not saved is lost")
            sys.stdout.flush()
            os._exit(130)  # a compiler that is at work would end the process with a crash
        asked["signal"] = number
        command.say("the step at work ends, then the state is saved; Ctrl-C again does not wait")

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _profile(settings: Settings) -> Iterator[Any]:
    """Yield a function to call before each step; it records the wanted steps in OUT/profile."""
    on, remote = False, paths.is_remote(settings.out)
    folder = Path(tempfile.mkdtemp()) if remote else settings.out / "profile"

    def at(position: int, finish: Callable[[], None]) -> None:
        nonlocal on
        if settings.profile is None:
            return
        first, last = settings.profile
        if on != (first <= position + 1 <= last):
            finish()  # what is under way belongs to the steps before
        if not on and first <= position + 1 <= last:
            jax.profiler.start_trace(str(folder))
            on = True
        elif on and position + 1 > last:
            jax.profiler.stop_trace()
            on = False

    try:
        yield at
    finally:
        if on:
            jax.profiler.stop_trace()
        if remote:
            paths.upload_folder(folder, settings.out / "profile")
            paths.remove_tree(folder)


def _due(position: int, every: int) -> bool:
    return every > 0 and position % every == 0


def _peak() -> float | None:
    """The peak FLOP/s of all devices together; None if unknown."""
    chip = hardware.of_kind(jax.devices()[0].device_kind)
    return chip and chip.flops * jax.sharding.get_mesh().size


def _memory() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
