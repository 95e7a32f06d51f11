"""Progress of long work, on a terminal and in a pipe."""

import io
import sys

import pytest

from qwen_jax.runtime import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **settings: object) -> str:
    """What is printed in 100 seconds of work, a step a second."""
    clock = [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.bar(desc="work", unit="step", **{"total": 100, **settings}) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
            bar.refresh()
    return stream.getvalue()


def test_in_a_pipe_a_line_now_and_then(monkeypatch):
    """Each 30 seconds and the last, as whole lines; `leave=False` drops the last."""
    for leave, expected in ((True, (30, 60, 90, 100)), (False, (30, 60, 90))):
        text = shown(monkeypatch, io.StringIO(), leave=leave)
        assert "\r" not in text and text.endswith("\n")
        steps = [line.partition("|")[0].split() for line in text.splitlines()]
        assert steps == [["work:", f"{n}%"] for n in expected]


def test_what_is_waited_for_is_said_at_once(monkeypatch):
    """Where no total is known: a compiler says nothing of how far it is."""
    text = shown(monkeypatch, io.StringIO(), total=None, bar_format="{desc}, {n}")
    assert text.splitlines() == [f"work, {n}" for n in (0, 30, 60, 90, 100)]


def test_on_a_terminal_a_bar_moves(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert text.count("\r") > 50 and text.endswith("\n") and text.count("\n") == 1


def test_lines_that_are_printed_meanwhile_stay_whole(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress.bar(total=2) as bar:
        bar.update()
        bar.write("a note", file=sys.stderr)
        bar.update()
    note, last = stream.getvalue().splitlines()
    assert note == "a note" and last.startswith("100%")
