"""Training steps in several processes, real ones."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import checkpoint
from tests import launch
from tests.conversion import GOLDEN, contents, there
from tests.test_processes import complaint, succeeded

STEPS = "tests/programs/steps.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "golden"
    there(GOLDEN, path)
    return path


def test_a_step_is_that_of_one_process(tmp_path, model):
    """Loss, norm, and every gradient; two devices of each process, or four of one."""
    mesh = "context=2,tp=2"  # keys go round between the processes
    said, moments = [], []
    for count in (1, 2):
        file = tmp_path / f"{count}.npz"
        with launch.group([STEPS, model, file, "--mesh", mesh], count) as group:
            said.append(json.loads(succeeded(group)[0].out))
        moments.append(dict(np.load(file)))
    for name, value in said[0].items():
        np.testing.assert_allclose(said[1][name], value, rtol=2e-6, err_msg=name)
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == 15
    for name, value in moments[0].items():
        atol = 2e-6 * np.abs(value).max()
        np.testing.assert_allclose(moments[1][name], value, rtol=0, atol=atol, err_msg=name)


def test_the_other_stops_when_one_dies_in_a_step(tmp_path, model):
    """And the checkpoint that training began with is as it was."""
    before = contents(model)
    command = [STEPS, model, tmp_path / "moments.npz", "--mesh", "fsdp=2", "--steps", 10**9]
    with launch.group(command, 2) as group:
        group.until(lambda: group.read(0, "out").count("loss") > 3)
        group.kill(1)
        result = group.wait(60)[0]
    name = socket.gethostname()
    assert complaint(result).startswith(f"error: process 1 ({name}) has died")
    assert not (tmp_path / "moments.npz").exists()
    assert contents(model) == before
    checkpoint.load(model)
