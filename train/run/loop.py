"""Runs the training loop: takes, logs and evaluates steps, saves checkpoints, stops on a signal.

A step's report is read only when later steps are under way, so that the device never waits for the
host. Knows no recipe and no model.
"""

import collections
import contextlib
import dataclasses
import functools
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
from jaxtyping import PyTree

from qwen_jax.meshes import hardware, moves
from qwen_jax.runtime import command, paths, processes
from train.data.batch import Batch
from train.data.batches import Batches, once
from train.data.packing import Rows
from train.run.checkpoints import Checkpoints
from train.run.logs import HELD_OUT, Log
from train.run.run_folder import CHECKPOINTS
from train.step import Report, State
from train.step.loss import perplexity as perplexity_of

_IN_FLIGHT = 2  # steps that are under way while the next is prepared
_SKIPPED = 10  # batches in a row with a NaN or infinite value: then the batches are not the cause
_NOTICE = 2 * _IN_FLIGHT + 2  # steps from a signal to the end, so that every process learns of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run besides its recipe: its folder, and when to evaluate, save and stop.

    out: the folder of the run.
    evaluate, save: the steps between two evaluations, and between two checkpoints. Both also happen
        at the end, and with 0 only then.
    keep_last: the number of latest checkpoints to keep.
    keep_best: the number of best checkpoints to keep besides; if not 0, every save evaluates first.
    resume: whether to continue the run in `out`.
    on_nan: "stop" at a NaN or infinite loss or gradient, or "skip" the batch. No other setting
        changes what is computed.
    profile: the first and the last step to profile, or None.
    merge: whether to write the model with its adapters merged at the end.
    token_cache: the folder of token caches; None for the default.
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
    """A loss or gradient was NaN or infinite; the batch and the last good state have been saved."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """The training loop with all that it uses: log, evaluation, checkpoints and signals.

    settings: the settings of the run.
    run, evaluate: the functions that `step.make_step` and `step.make_evaluation` build.
    base: the frozen weights that both functions take, or None.
    batches: the training batches, from `position` on.
    held_out, held_out_rows: the rows to evaluate on, or None, and how many to evaluate together.
    checkpoints, log: the checkpoints and the log of the run.
    check: raises `lock.Busy` if another program has taken the run's lock; called before each save.
    steps: the number of steps in the whole run.
    position: the number of steps taken so far.
    tokens: the number of tokens in a batch, without padding.
    flops: the FLOPs of training per token.
    evaluation_due: whether a signal cut off the evaluation at `position`, which is still due.
    """

    settings: Settings
    run: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    base: PyTree
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
    evaluation_due: bool = False
    _skipped: int = 0
    _in_flight: collections.deque[tuple[int, Batch, Report]] = dataclasses.field(
        default_factory=collections.deque
    )
    _logged: float = dataclasses.field(default_factory=time.perf_counter)

    def go(self, state: State, stop: dict[str, int]) -> State:
        """Run steps to the end, or until all processes know of a signal; return the last state.

        state: the training state after `position` steps. stop: the dict that `signals` yields.
        """
        settings, end = self.settings, self.steps
        so_far = moves.place(np.array(True), "")
        if self.evaluation_due:
            self._evaluated(state, stop)
            end = self.position if self.evaluation_due else end
        with _profile(settings) as profiled:
            while self.position < end:
                profiled(self.position, functools.partial(self._log_all, state))
                if "signal" in stop and "at" not in stop:
                    notice = _NOTICE if processes.count() > 1 else 1
                    stop["at"] = processes.propose(self.position + notice)
                end = min(end, stop.get("at") or processes.proposed() or end)
                batch = next(self.batches)
                state, report = self.run(state, batch, self.base, so_far)
                so_far = report.finite if settings.on_nan == "stop" else so_far
                self.position += 1
                self._in_flight.append((self.position, batch, report))
                while len(self._in_flight) > _IN_FLIGHT:
                    self._log_oldest(state)
                evaluated = None
                wanted = _due(self.position, settings.evaluate) or self.position == self.steps
                # This follows from the step alone, so that all processes evaluate together.
                if wanted or (settings.keep_best and _due(self.position, settings.save)):
                    evaluated = self._evaluated(state, stop)
                    end = self.position if self.evaluation_due else end
                if _due(self.position, settings.save) or self.position == end:
                    self._log_all(state)
                    self._save(self.position, state, loss=evaluated)
            self._log_all(state)
        return state

    def _save(self, position: int, state: State, *, loss: float | None = None) -> None:
        """Save the state after `position` steps. loss: the held-out loss there, if it is known."""
        self.check()
        self.log.upload()  # first, as a run that resumes from the checkpoint continues the log
        facts = {"position": position, "owed": self.evaluation_due}
        self.checkpoints.save(position, state, facts=facts, loss=loss)

    def stopped(self, stop: dict[str, int]) -> bool:
        """Return whether any process got a signal, even after its last step; all processes call it.

        stop: the dict that `signals` yields.
        """
        signalled = "signal" in stop
        if signalled:
            processes.propose(self.position)
        processes.barrier()
        return signalled or processes.proposed() is not None

    def _log_all(self, state: State) -> None:
        """Wait for all steps in flight and log their reports. state: after the newest step."""
        while self._in_flight:
            self._log_oldest(state)

    def _log_oldest(self, state: State) -> None:
        """Wait for the oldest step in flight and log its report. state: after the newest step."""
        number, batch, report = self._in_flight.popleft()
        report = jax.device_get(report)
        self._skipped = 0 if report.finite else self._skipped + 1
        if self._skipped:
            self._not_a_number(number, batch, report=report, state=state)
        now = time.perf_counter()
        seconds, self._logged = now - self._logged, now
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
        self.log.write(number, figures)
        shown = {"loss": f"{figures['loss']:.3f}", "tok/s": f"{rate:,.0f}"}
        shown |= {"mfu": f"{figures['mfu']:.0%}"} if "mfu" in figures else {}
        self.log.show(number, **shown)

    def _not_a_number(self, number: int, batch: Batch, *, report: Report, state: State) -> None:
        """Save the batch of a step whose loss or gradients are not finite.

        number: the step. report: its metrics. state: the state after the newest step. Raises
        NotANumber, unless the settings say to skip such batches.
        """
        path = self.settings.out / f"batch-{number}.npz"
        fields = dataclasses.fields(batch)
        whole: dict[str, Any] = {
            field.name: moves.fetch(getattr(batch, field.name)) for field in fields
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
        saved = self._save_good(number - 1, state)  # no later step has changed the state
        raise NotANumber(
            f"{what}; the batch is in {path}; {saved}: --resume goes on from there, with "
            "--on-nan skip without this batch"
        )

    def _save_good(self, position: int, state: State) -> str:
        """Save a state that no NaN or infinite step has changed; return where, for a message.

        position: the number of steps that the state has taken.
        """
        if position == 0:
            return "no step was taken before it"
        self._save(position, state)
        return f"the state after step {position} is in {self.settings.out / CHECKPOINTS}"

    def _evaluated(self, state: State, stop: dict[str, int]) -> float | None:
        """Measure the mean held-out loss, log and return it; None without held-out rows.

        With one process, a signal cuts the evaluation off: the result is None, and `evaluation_due`
        is set. Several processes evaluate together to the end. stop: the dict that `signals`
        yields.
        """
        if self.held_out is None:
            return None
        self._log_all(state)
        sums = np.zeros(3)
        for batch in once(self.held_out, self.held_out_rows):
            self.evaluation_due = "signal" in stop and processes.count() == 1
            if self.evaluation_due:
                return None
            metrics = jax.device_get(self.evaluate(state.weights, batch, self.base))
            sums += metrics.targets * np.array([metrics.loss, metrics.accuracy, 1])
        loss, accuracy = sums[:2] / max(1.0, sums[2])
        perplexity = perplexity_of(float(loss))
        figures = {"loss": loss, "accuracy": accuracy, "perplexity": perplexity}
        self.log.write(self.position, figures, prefix=HELD_OUT)
        where = f"step {self.position}"
        command.say(f"{where}: held-out loss {loss:.4f}, perplexity {command.decimals(perplexity)}")
        self._logged = time.perf_counter()
        return float(loss)


@contextlib.contextmanager
def signals() -> Iterator[dict[str, int]]:
    """Catch SIGTERM and Ctrl-C, and yield a dict whose "signal" becomes the number of the signal.

    The loop then saves and stops. A second Ctrl-C ends the process at once, whatever it does.
    """
    stop: dict[str, int] = {}

    def handle(number: int, _: object) -> None:
        if stop.get("signal") == number == signal.SIGINT:
            if processes.count() > 1:
                raise KeyboardInterrupt  # the other processes learn of this error
            command.say("interrupted; what was not saved is lost")
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(130)  # a compiler that is at work would end the process with a crash
        stop["signal"] = number
        command.say("the step at work ends, then the state is saved; Ctrl-C again does not wait")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _profile(settings: Settings) -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Yield a function that records the steps to be profiled in OUT/profile.

    The function is called before each step, with the number of steps taken and a function that
    waits for the steps in flight.
    """
    on, remote = False, paths.is_remote(settings.out)
    folder = Path(tempfile.mkdtemp()) if remote else settings.out / "profile"

    def at(position: int, finish: Callable[[], None]) -> None:
        nonlocal on
        if settings.profile is None:
            return
        first, last = settings.profile
        if on != (first <= position + 1 <= last):
            finish()  # the steps in flight belong to the time before
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
    """Return whether `position` is a multiple of `every`, in steps; never if `every` is 0."""
    return every > 0 and position % every == 0


def _peak() -> float | None:
    """Return the peak FLOP/s of all devices together; None if the chip is unknown."""
    chip = hardware.of_kind(jax.devices()[0].device_kind)
    return chip and chip.flops * jax.sharding.get_mesh().size


def _memory() -> int | None:
    """Return the peak bytes in use on this process's first device; None if it reports none."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
