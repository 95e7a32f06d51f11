"""Counts the programs that are compiled while something runs, cached ones included."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """A list that gets an entry for each program compiled within the context."""
    found: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(0)
        assert found, "jax tells of a compilation in another way"
        found.clear()
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
