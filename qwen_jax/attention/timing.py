"""How long programs take: they take turns, and a figure is a median."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels import choice

_SECONDS = 0.02  # that a turn takes at least, so that the clock and the host do not count

Program = Callable[[], Any]


def medians(programs: dict[str, Program], rounds: int) -> dict[str, float]:
    """Seconds of a call of each, over rounds in which each has its turn."""
    calls = {name: _calls(program) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(_timed(program, calls[name]) / calls[name])
    return {name: statistics.median(each) for name, each in times.items()}


def _calls(program: Program) -> int:
    """How many calls fill a turn. It warms up on the way."""
    _timed(program, 1)
    calls = 1
    while (seconds := _timed(program, calls)) < _SECONDS:
        calls = max(2 * calls, min(16 * calls, math.ceil(calls * _SECONDS / max(seconds, 1e-9))))
    return calls


def _timed(program: Program, calls: int) -> float:
    started = time.perf_counter()
    results = [program() for _ in range(calls)][-1:]
    jax.block_until_ready(results)
    return time.perf_counter() - started


def product(dtype: str) -> tuple[Program, float]:
    """A large matrix product, and its FLOPs."""
    size = 512 if choice.device().platform == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    return compiled(jnp.dot, x, x), 2.0 * size**3


def copy() -> tuple[Program, float]:
    """A copy of much memory, and the bytes that it reads and writes."""
    size = 2**24 if choice.device().platform == "cpu" else 2**29
    x = jnp.ones(size // 4, jnp.float32)
    return compiled(lambda x: x + 1, x), 2.0 * size


def compiled(run: Callable[..., Any], *args: Any) -> Program:
    compiled = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    return functools.partial(compiled, *args)
