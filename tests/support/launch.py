"""Runs one command as n real processes on this machine, watches them and cleans up.

    with launch.group(["convert/from_hf.py", src, dst], 4) as group:
        results = group.wait()

Every process gets the arguments of `process_options.add` after its own, and has one CPU device
unless it requests more.
"""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONG = 1800.0  # seconds: more than a test that passes takes on any machine, however busy
# Seconds after which a killed process counts as lost: longer than a living one is ever suspended.
SHORT = 20


@dataclasses.dataclass(frozen=True)
class Result:
    """The exit code and the output of a process."""

    code: int
    out: str
    err: str


class Group:
    """The processes of a command by their number; a number that was not started is missing."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]], folder: Path):
        self._processes, self._folder = processes, folder

    def kill(self, number: int, with_signal: int = signal.SIGKILL) -> None:
        """Send a signal to a process; by default SIGKILL, as the kernel does when memory
        runs out.
        """
        self._processes[number].send_signal(with_signal)

    def wait(self) -> dict[int, Result]:
        """Wait for all processes, and return their results.

        Raises AssertionError with their output if one does not end.
        """
        deadline = time.monotonic() + LONG
        while running := [i for i, x in self._processes.items() if x.poll() is None]:
            if time.monotonic() > deadline:
                said = {i: self.read(i, "err")[-2000:] for i in self._processes}
                raise AssertionError(f"{running} still run after {LONG:g} s: {said}")
            time.sleep(0.02)
        return {
            i: Result(process.returncode, self.read(i, "out"), self.read(i, "err"))
            for i, process in sorted(self._processes.items())
        }

    def until(self, begun: Callable[[], bool]) -> None:
        """Wait until a condition on the processes' work holds.

        Raises AssertionError if a process ends before that.
        """
        deadline = time.monotonic() + LONG
        while not begun():
            over = [i for i, process in self._processes.items() if process.poll() is not None]
            if over or time.monotonic() > deadline:
                raise AssertionError(f"not begun, {over} ended: {self.read(0, 'err')[-2000:]}")
            time.sleep(0.001)

    def read(self, number: int, kind: str) -> str:
        """The output of a process so far. kind: "out" or "err"."""
        file = self._folder / f"{number}.{kind}"
        return file.read_text(errors="replace") if file.exists() else ""


@contextlib.contextmanager
def group(
    arguments: Sequence[object],
    count: int,
    present: Collection[int] | None = None,
    start_timeout: float = LONG,
    heartbeat: float = 300,
) -> Iterator[Group]:
    """Start `python *arguments` count times, or only as the processes `present`.

    start_timeout, heartbeat: seconds, for the options of these names; heartbeat should be SHORT if
        a process is to be lost.
    """
    common = [sys.executable, *map(str, arguments), "--coordinator", f"127.0.0.1:{free_port()}"]
    common += ["--processes", str(count), "--start-timeout", f"{start_timeout:.0f}"]
    common += ["--heartbeat-timeout", f"{heartbeat:.0f}"]
    processes: dict[int, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for i in range(count) if present is None else present:
                with open(folder / f"{i}.out", "wb") as out, open(folder / f"{i}.err", "wb") as err:
                    processes[i] = subprocess.Popen(
                        [*common, "--process", str(i)],
                        cwd=ROOT,
                        env=environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                    )
            yield Group(processes, folder)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def environment() -> dict[str, str]:
    """This process's environment without the tests' eight devices and without what importing jax
    sets.

    Programs are compiled with little optimisation, as all processes compile at the same time.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    flags += " --xla_backend_optimization_level=0"
    result = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return result


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
