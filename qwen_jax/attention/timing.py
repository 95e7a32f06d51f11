"""Times compiled programs, which take turns, and reports medians."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels import choice

_SECONDS = 0.02  # the least duration of a turn, which makes the clock and the host negligible

TimedCall = Callable[[], Any]


def medians(programs: dict[str, TimedCall], rounds: int) -> dict[str, float]:
    """Return each program's median seconds per call, over rounds in which all take turns."""
    calls = {name: _calls(program) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(_timed(program, calls[name]) / calls[name])
    return {name: statistics.median(each) for name, each in times.items()}


def _calls(program: TimedCall) -> int:
    """Return how many calls of a program fill a turn of `_SECONDS`. The trials warm it up."""
    _timed(program, 1)
    calls = 1
    while (seconds := _timed(program, calls)) < _SECONDS:
        calls = max(2 * calls, min(16 * calls, math.ceil(calls * _SECONDS / max(seconds, 1e-9))))
    return calls


def _timed(program: TimedCall, calls: int) -> float:
    """Return the seconds that `calls` calls take, until the last result is computed."""
    started = time.perf_counter()
    results = [program() for _ in range(calls)][-1:]
    jax.block_until_ready(results)
    return time.perf_counter() - started


def product(dtype: str) -> tuple[TimedCall, float]:
    """Return a program that multiplies large matrices, and the FLOPs of one call."""
    size = 512 if choice.device().platform == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    return compiled(jnp.dot, x, x), 2.0 * size**3


def copy() -> tuple[TimedCall, float]:
    """Return a program that copies much memory, and the bytes that one call reads and writes."""
    size = 2**24 if choice.device().platform == "cpu" else 2**29
    x = jnp.ones(size // 4, jnp.float32)
    return compiled(lambda x: x + 1, x), 2.0 * size


def compiled(run: Callable[..., Any], *args: Any) -> TimedCall:
    """Compile a function for its arguments, run it once, and return it with them bound."""
    compiled = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    return functools.partial(compiled, *args)
