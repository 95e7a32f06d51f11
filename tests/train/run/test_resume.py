"""Runs that are killed, again and again, and end as if nothing had been: real processes.

KILLS=10 kills as often; fewer here, as each costs a start.
"""

import functools
import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.test_processes import complaint, succeeded
from tests.support import launch
from tests.support.training import curve, prepared, pretraining, weights

STOPPED = "tests/programs/stopped.py"
# Where a checkpoint of Orbax's gets its name: what is there before has all but that.
NAMED = "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize"
KILLS = int(os.environ.get("KILLS", "4"))
STEPS = 60


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("given"))


def command(given: Path, out: Path) -> list[str]:
    options = ("--steps", STEPS, "--save-every", 4, "--eval-every", 10)
    held_out = ("--eval-data", given / "text.txt", "--dropout", 0.1)
    return ["train/pretrain.py", *pretraining(given, out, *options, *held_out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Any:
    """A run that nothing stopped, of so many processes."""

    @functools.cache
    def run(count: int) -> Path:
        out = tmp_path_factory.mktemp("whole") / "run"
        with launch.group(command(given, out), count) as group:
            succeeded(group)
        return out

    return run


def being_written(out: Path) -> bool:
    """Whether a checkpoint is half there."""
    folder = out / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.release)])
def test_killed_again_and_again(given, whole, tmp_path, count):
    """Figures of every step, evaluations and weights equal those of a run that nothing stopped, to
    the bit; some kills come at any step, some while a checkpoint is half written.
    """
    rng = np.random.default_rng(count)
    out = tmp_path / "killed"
    for number in range(KILLS):
        if half := number % 2 == 0:
            where, calls = NAMED, 5  # of the second checkpoint: a checkpoint has three names
        else:
            where, calls = (
                "train.run.logs:Log.show",
                int(rng.integers(1, max(2, STEPS // (KILLS + 1)))),
            )
        killed = [STOPPED, where, calls, 0, int(signal.SIGKILL), "train.pretrain"]
        again = [*killed, *command(given, out)[1:], "--resume"]
        with launch.group(again, count, heartbeat=launch.SHORT) as group:
            results = group.wait()
        assert results[0].code == -signal.SIGKILL
        if count == 2:  # the other is left alone, and says so
            assert "has died" in complaint(results[1])
        assert not half or being_written(out), "a checkpoint is cut short"
        assert not (out / "model").exists()
    with launch.group([*command(given, out), "--resume"], count) as group:
        assert "resumed from step" in succeeded(group)[0].err
    for of in ("train", "held_out"):
        assert curve(out, of) == curve(whole(count), of)
    assert list(curve(out)) == list(range(1, STEPS + 1))
    expected = weights(whole(count) / "model")
    for name, value in weights(out / "model").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(whole):
    """The same rows in the same order, each of them once, under the same dropout."""
    for number, figures in curve(whole(1)).items():
        other = curve(whole(2))[number]
        assert other["targets"] == figures["targets"], "the same rows"
        np.testing.assert_allclose(other["loss"], figures["loss"], rtol=1e-5)


@pytest.mark.slow
def test_an_error_while_encoding_ends_all_by_name(given, tmp_path):
    """Each process encodes a file; that of the second has a line that is no JSON."""
    for name, line in (("a", '{"text": "a"}'), ("b", "{")):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    data = ("--data", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--strict")
    options = (*data, "--token-cache", tmp_path / "tokens")
    command = ["train/pretrain.py", *pretraining(given, tmp_path / "run", *options)]
    with launch.group(command, 2) as group:
        lines = [complaint(result) for result in group.wait().values()]
    what = f"process 1 ({socket.gethostname()})"
    bad = f"{tmp_path / 'b.jsonl'} line 1: no JSON"
    assert lines[0].startswith(f"error: {what} has failed: {bad}")
    assert lines[1].startswith(f"error: {what}: {bad}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(15, 0), (2, 130)])
def test_a_signal_saves_first(given, tmp_path, number, code):
    """SIGTERM and Ctrl-C; on two processes one of them alone may hear it, at its fifth step."""
    out = tmp_path / "run"
    stopped = [STOPPED, "train.run.loop:Loop._log_oldest", 5, 1 if number == 15 else 0, number]
    with launch.group([*stopped, "train.pretrain", *command(given, out)[1:]], 2) as group:
        results = group.wait()
    assert results[0].code == code, results[0].err[-2000:]
    assert "--resume goes on from there" in results[0].err
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir())
    assert saved == max(curve(out)) < STEPS and not being_written(out)
