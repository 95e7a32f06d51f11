"""`make device`: a list of commands with time limits, what is kept of them, and what is not run
again. The rehearsal runs the real ones, tiny.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import device
from benchmarks.device import Task
from tests.support.launch import LONG

HERE = {"device": "a chip", "platform": "tpu", "jax": "0.11", "python": "3.12"}
WRITES = (
    "import sys; print('said'); "
    "open(sys.argv[1], 'w').write('| a table | --markdown ' + sys.argv[1])"
)


def task(name: str, part: int, program: str, seconds: int = int(LONG)) -> Task:
    return Task(name, part, ("-c", program, "{work}/table.md"), seconds, "table.md")


@pytest.fixture(autouse=True)
def _a_chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if there were an accelerator, and no results kept from before."""
    monkeypatch.setattr(device, "device_kind", lambda _: dict(HERE))
    monkeypatch.setattr(device, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(device, "WHEELS", tmp_path / "no-wheels")


def run(out: Path, *argv: str) -> int:
    return device.main(["--out", str(out), *argv])


def test_results_are_kept_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(device, "TASKS", [task("one", 1, WRITES), task("two", 2, WRITES)])
    assert run(out, "--part", "1") == 0
    (record,) = json.loads((out / "device.json").read_text())
    assert record["task"] == "one" and record["ended"] == "done"
    assert record["table"] == "| a table |" and record["said"] == ["said"]
    assert "| a table |" in (out / "device.md").read_text()
    assert run(out) == 0
    said = capsys.readouterr().out
    assert "one              measured 2" in said and "two              to do" in said
    assert [x["task"] for x in json.loads((out / "device.json").read_text())] == ["one", "two"]
    first = (out / "device.log").read_text()
    assert run(out) == 0 and (out / "device.log").read_text() == first, "nothing ran again"
    assert run(out, "--again") == 0 and (out / "device.log").read_text() != first
    assert len(list(out.iterdir())) <= 8


def test_another_code_device_or_command_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(device, "TASKS", [task("one", 1, WRITES)])
    assert run(out) == 0
    (out / "device.json").rename(tmp_path / "kept.json")  # as results that were committed
    capsys.readouterr()
    assert run(tmp_path / "other", "--list") == 0
    assert "measured" in capsys.readouterr().out
    for change in ("code", "device", "arguments"):
        with monkeypatch.context() as patch:
            if change == "code":
                patch.setattr(device, "fingerprint", lambda: "another")
            elif change == "device":
                patch.setattr(device, "device_kind", lambda _: HERE | {"device": "another"})
            else:
                changed = dataclasses.replace(task("one", 1, WRITES), arguments=("-c", "pass"))
                patch.setattr(device, "TASKS", [changed])
            assert run(tmp_path / "other", "--list") == 0
        assert "to do" in capsys.readouterr().out, change


def test_a_command_that_fails_or_hangs_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    hangs = task("hangs", 1, f"import time; time.sleep({LONG})", seconds=1)
    fails = task("fails", 2, f"{WRITES}; raise SystemExit('no memory')")
    monkeypatch.setattr(device, "TASKS", [hangs, fails, task("works", 3, WRITES)])
    assert run(out) == 1
    assert "hangs, fails: see" in capsys.readouterr().err
    found = {x["task"]: x for x in json.loads((out / "device.json").read_text())}
    assert found["hangs"]["ended"] == "stopped after 1 s"
    assert found["fails"]["ended"] == "exit code 1" and "a table" in found["fails"]["table"]
    assert found["fails"]["said"] == ["said", "no memory"]
    assert found["works"]["ended"] == "done"
    monkeypatch.setattr(device, "TASKS", [task("hangs", 1, WRITES)])
    assert run(out, "--list") == 0 and "to do" in capsys.readouterr().out, "it is tried again"


def test_a_cpu_is_no_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "device_kind", lambda _: HERE | {"platform": "cpu"})
    assert run(tmp_path / "out") == 1
    assert "--rehearse" in capsys.readouterr().err


def test_a_folder_that_cannot_hold_results(tmp_path, monkeypatch, capsys) -> None:
    """It is refused before the device is asked."""
    monkeypatch.setattr(device, "device_kind", lambda _: pytest.fail("the device is asked"))
    (tmp_path / "device.json").write_text('{"a": 1}')
    for out, line in (
        (tmp_path, f"error: {tmp_path}/device.json cannot be read: it is no list of objects; rem"),
        (tmp_path / "device.json", f"error: File exists: {tmp_path}/device.json"),
    ):
        assert device.main(["--rehearse", "--out", str(out)]) == 1
        assert capsys.readouterr().err.startswith(line)


def test_parts_take_at_most_five_minutes() -> None:
    for part in device.PARTS:
        assert 0 < sum(x.seconds for x in device.TASKS if x.part == part) <= 300
        assert any(x.part == part for x in device.REHEARSAL)


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of command, for real, on a CPU."""
    monkeypatch.undo()
    patient = [dataclasses.replace(task, seconds=int(LONG)) for task in device.REHEARSAL]
    monkeypatch.setattr(device, "REHEARSAL", patient)
    assert run(tmp_path, "--rehearse") == 0
    found = json.loads((tmp_path / "device.json").read_text())
    assert {x["part"] for x in found} == set(device.PARTS)
    assert all(x["ended"] == "done" for x in found)
    assert all(x["table"].count("|") > 8 for x in found if x["task"] != "tune")
    (line,) = json.loads((tmp_path / "measured.json").read_text())
    assert line["kernel"] == "xla"
