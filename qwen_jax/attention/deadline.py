"""A time limit for self-tests of kernels, which holds even if a compiler or driver hangs."""

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from qwen_jax.attention import registry

LIMIT = 120.0  # seconds to compile and run a kernel for one task


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run `work` for at most `seconds`, and return its result or raise its exception.

    Raises TimeoutError if it takes longer, and abandons it. It runs in a thread with no mesh in
    force, on this process's first device.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="self-test of attention")
    thread.start()
    try:
        thread.join(seconds)
    finally:
        if thread.is_alive():
            atexit.register(wait_at_exit, thread)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def wait_at_exit(thread: threading.Thread) -> None:
    """Wait, when the process ends, for an abandoned self-test that is still inside a compiler.

    Otherwise the interpreter would free memory that the compiler uses. If the self-test has not
    ended after `LIMIT` seconds, the process ends with exit code 1.

    thread: the thread in which the self-test runs.
    """
    if not thread.is_alive():
        return
    registry.log_once(f"attention: up to {LIMIT:g} s more for the compiler of a self-test to end")
    thread.join(LIMIT)
    if thread.is_alive():
        line = "attention: the compiler of a self-test hangs: this process ends with exit code 1"
        registry.log_once(line, logging.WARNING)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(1)
