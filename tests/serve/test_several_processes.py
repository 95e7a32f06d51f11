"""One server on two real processes: an orderly end under load, and a process that is lost."""

import json
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from convert import from_hf
from tests.support import launch

pytestmark = pytest.mark.slow
MODEL = launch.ROOT / "examples/moby_dick/model"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("moby") / "ckpt"
    assert from_hf.main([str(MODEL), str(target)]) == 0
    return target


class Request(threading.Thread):
    """A request for many tokens; became: its finish reason, or the error that its client sees."""

    def __init__(self, port: int, tokens: int):
        super().__init__()
        self.port, self.tokens = port, tokens
        self.became = ""
        self.start()

    def run(self) -> None:
        body = {"prompt": "The whale", "max_tokens": self.tokens, "ignore_eos": True, "seed": 1}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(asked) as answer:
                self.became = json.load(answer)["choices"][0]["finish_reason"]
        except Exception as error:
            self.became = f"error: {error}"


def told(port: int, text: str) -> bool:
    """Whether the server listens, and its figures have a text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return text in answer.read().decode()
    except urllib.error.URLError:
        return False


@pytest.mark.parametrize("end", ["SIGTERM to both", "process 1 is killed", "process 1 hangs"])
def test_two_processes(ckpt: Path, end: str) -> None:
    port = launch.free_port()
    command = ["-m", "qwen_jax.serve", "--ckpt", ckpt, "--mesh", "tp=2", "--port", port]
    command += ["--rows", 2, "--max-length", 4096]
    # Its heartbeats end, too: here the engine is to notice.
    command += ["--step-timeout", 5 if "hangs" in end else 300]
    heartbeat = 300 if "hangs" in end else launch.SHORT
    with launch.group(command, 2, heartbeat=heartbeat) as group:
        group.until(lambda: told(port, "vllm:num_requests_running"))
        request = Request(port, 600 if "SIGTERM" in end else 4000)
        group.until(lambda: told(port, 'num_requests_running{model_name="ckpt"} 1.0'))
        if "SIGTERM" in end:
            group.kill(1, signal.SIGTERM)
            group.kill(0, signal.SIGTERM)
        elif "hangs" in end:
            group.kill(1, signal.SIGSTOP)
            request.join()
            group.until(lambda: "hangs" in group.read(0, "err"))
        if "SIGTERM" not in end:
            group.kill(1)
        results = group.wait()
        request.join()
    if "SIGTERM" in end:  # the first process drains, and ends the other
        assert request.became == "length"
        assert [result.code for result in results.values()] == [0, 0], results
    else:
        assert request.became.startswith("error: ")
        assert results[0].code == 1
        why = "a step has not finished within 5 s" if "hangs" in end else "process 1"
        assert why in results[0].err.splitlines()[-1]
