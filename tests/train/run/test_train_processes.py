"""Training steps in several processes, real ones."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import checkpoint
from tests.runtime.test_processes import complaint, succeeded
from tests.support import launch
from tests.support.conversion import GOLDEN, contents, there

STEPS = "tests/programs/steps.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "golden"
    there(GOLDEN, path)
    return path


def taken(model: Path, file: Path, count: int, mesh: str) -> tuple[Any, dict[str, np.ndarray]]:
    """What one step says, and its gradients; the devices are shared out among the processes."""
    with launch.group([STEPS, model, file, "--mesh", mesh], count) as group:
        said = json.loads(succeeded(group)[0].out)
    return said, dict(np.load(file))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model) -> Any:
    return taken(model, tmp_path_factory.mktemp("alone") / "1.npz", 1, "context=2,tp=2")


@pytest.mark.parametrize(
    ("count", "mesh", "bound"),
    [
        (2, "context=2,tp=2", 1e-5),  # keys go round between the processes
        pytest.param(
            4, "fsdp=2,tp=2", 1e-5, marks=pytest.mark.slow
        ),  # every collective does; sums of another order
    ],
)
def test_a_step_is_that_of_one_process(tmp_path, model, alone, count, mesh, bound):
    """Loss, norm, and every gradient; two devices of each process, or one, or four of one."""
    said, moments = taken(model, tmp_path / "many.npz", count, mesh)
    assert said.keys() == alone[0].keys()
    for name, value in alone[0].items():
        np.testing.assert_allclose(said[name], value, rtol=1e-5, err_msg=name)
    assert moments.keys() == alone[1].keys() and len(moments) == 15
    for name, value in alone[1].items():
        atol = bound * np.abs(value).max()
        np.testing.assert_allclose(moments[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_stops_when_one_dies_in_a_step(tmp_path, model, victim):
    """And the checkpoint that training began with is as it was."""
    before = contents(model)
    command = [STEPS, model, tmp_path / "moments.npz", "--mesh", "fsdp=2", "--steps", 10**9]
    with launch.group(command, 2, heartbeat=launch.SHORT) as group:
        group.until(lambda: group.read(0, "out").count("loss") > 3)
        group.kill(victim)
        result = group.wait()[1 - victim]
    name = socket.gethostname()
    assert complaint(result).startswith(f"error: process {victim} ({name}) has died")
    assert not (tmp_path / "moments.npz").exists()
    assert contents(model) == before
    checkpoint.load(model)
