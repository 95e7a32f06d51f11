"""One engine on two real processes."""

import pytest

from tests.support import launch


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "data=2"])
def test_two_processes_have_one_truth(mesh: str) -> None:
    command = ["tests/programs/engines.py", "--mesh", mesh, "--schedules", 12]
    with launch.group(command, 2) as group:
        results = group.wait()
    assert [x.code for x in results.values()] == [0, 0], [x.err[-2000:] for x in results.values()]
    assert "the same bits" in results[0].out


@pytest.mark.slow
def test_a_lost_process_ends_all_with_a_line_that_names_it() -> None:
    command = ["tests/programs/engines.py", "--mesh", "tp=2", "--schedules", 100_000]
    with launch.group(command, 2, heartbeat=launch.SHORT) as group:
        group.until(lambda: "schedule" in group.read(0, "out"))
        group.kill(1)
        results = group.wait()
    assert results[0].code == 1
    assert "process 1" in results[0].err.splitlines()[-1]
