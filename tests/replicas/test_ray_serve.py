"""Two replicas on this machine under load, of which one is killed: no request is lost silently."""

import collections
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launch import LONG, ROOT, free_port

CLIENTS = 6
SEEDS = 4
BETWEEN = 25  # requests answered before the kill, and between it and what follows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request: its answer, or its error, and seconds when it began and ended."""

    kind: tuple[bool, int]
    began: float
    ended: float
    text: str | None
    error: str | None


def request(port: int, **body: object) -> http.client.HTTPConnection:
    """A connection that has sent a request for a text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)
    told = json.dumps({"prompt": "The whale", "temperature": 1, "ignore_eos": True, **body})
    connection.request("POST", "/v1/completions", told, {"Content-Type": "application/json"})
    return connection


@dataclasses.dataclass(frozen=True)
class Served:
    """The port of replicas, the process that has started them, and the file of what they say."""

    port: int
    process: int
    said: Path

    def ready(self) -> int:
        """The number of replicas that have been ready so far."""
        return self.said.read_text().count("ready to generate")


def ask(port: int, stream: bool, seed: int) -> tuple[str | None, str | None]:
    """Return a request's text, or the error that its client sees. AssertionError if neither."""
    try:
        with contextlib.closing(request(port, max_tokens=48, seed=seed, stream=stream)) as sent:
            answer = sent.getresponse()
            read = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return None, type(error).__name__
    if answer.status != 200:
        return None, f"status {answer.status}"
    if not stream:
        return json.loads(read)["choices"][0]["text"], None
    events = [line.removeprefix(b"data: ") for line in read.split(b"\n\n") if b"data: " in line]
    assert events and events[-1] == b"[DONE]", "a stream ended without its end or an error"
    chunks = [json.loads(event) for event in events[:-1]]
    if told := [chunk["error"]["message"] for chunk in chunks if "error" in chunk]:
        return None, told[0]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["text"] for choice in choices), None


class Load:
    """Clients that send one request after the other, streams and plain ones, until they are told.

    outcomes: of all requests that are over.
    sent: the number of requests that were begun.
    """

    def __init__(self, port: int):
        self.outcomes: list[Outcome] = []
        self.failures: list[BaseException] = []
        self.sent = 0
        self._port, self._over, self._lock = port, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def answered(self) -> int:
        return sum(one.text is not None for one in self.outcomes)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._over.is_set():
            with self._lock:
                number, self.sent = self.sent, self.sent + 1
            kind = (number % 2 == 0, number // 2 % SEEDS)
            began = time.monotonic()
            try:
                text, error = ask(self._port, *kind)
            except BaseException as failure:
                self.failures.append(failure)
                return
            self.outcomes.append(Outcome(kind, began, time.monotonic(), text, error))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("moby") / "ckpt"
    command = [sys.executable, "convert/from_hf.py", "examples/moby_dick/model", str(target)]
    subprocess.run(command, cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def served(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas, of four rows each."""
    port, said = free_port(), tmp_path_factory.mktemp("said") / "ray.log"
    command = [sys.executable, "examples/ray_serve.py", "--ckpt", str(ckpt), "--port", str(port)]
    command += ["--replicas", "2", "--rows", "4", "--max-length", "2048"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with (
        said.open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            until(lambda: "serving 2 replicas" in said.read_text() or process.poll() is not None)
            assert process.poll() is None, said.read_text()[-3000:]
            yield Served(port, process.pid, said)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(LONG) == 0, said.read_text()[-3000:]


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def replicas(ancestor: int) -> set[int]:
    """The processes of the replicas that a process has started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if title.startswith(b"ray::ServeReplica") and ancestor in above(int(folder.name)):
            found.add(int(folder.name))
    return found


def above(process: int) -> list[int]:
    """The processes that have led to a process, the nearest first."""
    found = []
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            break
        process = int(stat.rpartition(")")[2].split()[1])
        found.append(process)
    return found


def test_a_client_that_goes_takes_its_sequence_along(served: Served) -> None:
    with contextlib.closing(request(served.port, max_tokens=2000, stream=True)) as sent:
        assert sent.getresponse().read(6) == b"data: "

    def aborted() -> bool:  # each look is answered by one of the replicas
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:
            return b'finished_reason="abort",model_name="ckpt"} 1.0' in answer.read()

    until(aborted)


def test_a_replica_killed_under_load(served: Served) -> None:
    load = Load(served.port)

    def more() -> None:
        seen = load.answered()
        until(lambda: load.answered() >= seen + BETWEEN or load.failures)

    try:
        more()
        before = replicas(served.process)
        assert len(before) == served.ready() == 2
        killed = time.monotonic()
        os.kill(min(before), signal.SIGKILL)
        more()
        until(lambda: served.ready() == 3 or load.failures)  # Ray has made another in its place
        back = time.monotonic()
        more()
    finally:
        load.end()
    assert load.failures == []
    assert len(load.outcomes) == load.sent  # each has its answer or an error
    answers = [one for one in load.outcomes if one.text is not None]
    errors = [one for one in load.outcomes if one.error is not None]
    # Only what the dead replica had taken is lost, and its clients see that.
    assert len(errors) <= CLIENTS
    texts = collections.defaultdict(set)
    for one in answers:
        texts[one.kind[1]].add(one.text)
    assert sorted(texts) == list(range(SEEDS))
    assert all(len(same) == 1 for same in texts.values())  # whichever replica, in whatever company
    first = min(one.ended for one in answers if one.began > killed)
    told = collections.Counter(one.error for one in errors)
    print(
        f"\n{load.sent} requests, {len(answers)} answered, {len(errors)} errors {dict(told)}; a "
        f"request sent after the kill was answered {first - killed:.1f} s after it, and another "
        f"replica was ready {back - killed:.1f} s after it"
    )
