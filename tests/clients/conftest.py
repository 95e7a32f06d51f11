"""Real clients of the OpenAI API, in an environment of their own: the extra `clients`.

They talk to the server of `tests.programs.serving`, which the Python named by SERVER_PYTHON runs
(.venv/bin/python without it), or that is there already: QWEN_JAX_SERVER is its address. Without
the packages of the extra, these tests are not collected.
"""

import importlib.util
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("openai", "langchain_openai", "smolagents")
ROOT = Path(__file__).parents[2]

there = all(importlib.util.find_spec(package) for package in PACKAGES)
collect_ignore = [] if there else ["test_clients.py"]


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of the server, with /v1."""
    if given := os.environ.get("QWEN_JAX_SERVER"):
        yield f"{given}/v1"
        return
    python = os.environ.get("SERVER_PYTHON", str(ROOT / ".venv/bin/python"))
    with subprocess.Popen(
        [python, "-m", "tests.programs.serving"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"{url}/v1"
        process.terminate()
