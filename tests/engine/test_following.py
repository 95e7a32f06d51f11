"""One engine on two real processes."""

import json
import os
import socket

import pytest

from qwen_jax.engine import following
from qwen_jax.engine.steps import Steps
from qwen_jax.runtime import processes, watch
from tests.support import launch

SCHEDULES = int(os.environ.get("SCHEDULES", "40"))


def test_process_0_is_reached_at_the_coordinators_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the one that its host has for itself, which is unknown elsewhere in Kubernetes."""
    joined = watch.Joined(0, ("pod-0", "pod-1"), "pod-0.group:8482", 30)
    monkeypatch.setattr(processes, "_joined", joined)
    told = []

    def gather(text: str) -> list[str]:
        told.append(json.loads(text))
        raise ConnectionError("nobody else is there")

    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(ConnectionError):
        following._accept(1)
    assert told[0][0] == "pod-0.group"


def test_a_lost_process_is_named_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = watch.Joined(0, ("pod-0", "pod-1"), "pod-0.group:8482", 30)
    monkeypatch.setattr(processes, "_joined", joined)
    leader = object.__new__(following.Leader)
    here, there = socket.socketpair()
    leader._lines = {1: here}
    there.close()
    with pytest.raises(ConnectionError, match=r"process 1 \(pod-1\) died or hangs"):
        leader._send("decode", {})
    leader.close()  # it cannot be told
    assert here.fileno() == -1


def test_processes_that_do_not_connect_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = watch.Joined(0, ("pod-0", "pod-1", "pod-2"), "localhost:8482", 30)
    monkeypatch.setattr(processes, "_joined", joined)
    monkeypatch.setattr(following, "_WAIT", 0.2)
    lines = []

    def gather(text: str) -> list[str]:
        _, port, secret = json.loads(text)
        right, index = bytes.fromhex(secret), (1).to_bytes(4)
        for word in (b"GET / HTTP/1.1", bytes(len(right)) + index, right + (2).to_bytes(4)):
            lines.append(socket.create_connection(("localhost", port)))
            lines[-1].sendall(word)
        lines[0].shutdown(socket.SHUT_WR)  # a program that is none of ours
        return [text]

    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(ConnectionError, match=r"^process 1 \(pod-1\) did not connect to port"):
        following._accept(2)
    for line in lines:
        line.close()


def test_where_process_0_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps(("localhost", launch.free_port(), "00"))
    monkeypatch.setattr(processes, "gather", lambda text: [told])
    with pytest.raises(ConnectionError, match=r"process 0 cannot be reached at localhost:\d+"):
        following.follow(object.__new__(Steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--mesh", "tp=2"],
        ["--mesh", "data=2", "--dtype", "bfloat16", "--cache-dtype", "int8"],
    ],
    ids=" ".join,
)
def test_two_processes_have_one_truth(options: list[str]) -> None:
    command = ["tests/programs/engines.py", *options, "--schedules", SCHEDULES * 3 // 10]
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
