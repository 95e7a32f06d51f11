"""Real processes for tests: one command started n times on this machine, watched and cleaned up.

    with launch.group(["convert/from_hf.py", src, dst], 4) as group:
        results = group.wait()

Every process gets the arguments of `command.add_processes` after its own, and one CPU device unless
it asks for more.
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
# Seconds. Nothing that goes well takes so long, however slow or busy the machine is.
LONG = 1800.0
# After so many a process that is killed is missed. No machine lets one that lives rest that long.
SHORT = 20


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Group:
    """The processes, by their number; those not started are not there."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]], folder: Path):
        self._processes, self._folder = processes, folder

    def kill(self, number: int, with_signal: int = signal.SIGKILL) -> None:
        """As the kernel does when memory runs out, unless another signal is named."""
        self._processes[number].send_signal(with_signal)

    def wait(self) -> dict[int, Result]:
        """Everyone's result. AssertionError, with what they said, when one never ends."""
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
        """Wait for something that the processes do."""
        deadline = time.monotonic() + LONG
        while not begun():
            over = [i for i, process in self._processes.items() if process.poll() is not None]
            if over or time.monotonic() > deadline:
                raise AssertionError(f"not begun, {over} ended: {self.read(0, 'err')[-2000:]}")
            time.sleep(0.001)

    def read(self, number: int, kind: str) -> str:
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
    """Start `python *arguments` count times, or as the processes `present` alone.

    heartbeat: SHORT where one of them is to be missed.
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
    """This process's, but for the eight devices of the tests, and what importing jax has added.

    Programs are compiled without much optimisation: every process compiles, all at the same time.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    flags += " --xla_backend_optimization_level=0"
    result = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return result


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
