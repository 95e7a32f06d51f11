"""`python -m qwen_jax.chat` with a tiny model: its replies, its options, and real processes."""

import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_jax
from qwen_jax.generate import from_options
from qwen_jax.terminal import program, prompting, screens
from qwen_jax.terminal.chat_settings import Settings
from qwen_jax.terminal.replies import Asked, ModelReplies
from tests.support.launch import LONG, ROOT, environment
from tests.terminal.stand_ins import Lines, session

COMMAND = [sys.executable, "-m", "qwen_jax.chat", "--ckpt"]
NEW = 6  # tokens of a reply
PASTES = r"\x1b\[\?2004h"  # a prompt tells the terminal to mark what is pasted


@pytest.fixture(scope="module")
def model(chat_dir: Path) -> qwen_jax.LanguageModel:
    """A model whose replies are short."""
    found = qwen_jax.load(chat_dir, max_length=64)
    settings = dataclasses.replace(found.generation_config, max_new_tokens=NEW)
    return dataclasses.replace(found, generation_config=settings)


def test_a_reply_is_the_librarys(model: qwen_jax.LanguageModel) -> None:
    """With the same history, settings and seed; and with another seed it is another."""
    settings = Settings.of(model.generation_config)
    history = (("Who are you?", "A model."),)
    replies, found = ModelReplies(model, ntk="prompt"), []
    for seed in (1234, 5):
        pieces = list(replies.stream(Asked("hi", history, "In verse.", settings, seed)))
        assert pieces[-1].ended == "length" and sum(x.tokens for x in pieces) == NEW
        found.append("".join(x.text for x in pieces).strip())
        assert found[-1] == model.chat("hi", history, "In verse.", seed=seed)[0]
    assert found[0] != found[1]
    stop = settings.changed(f"stop='{found[0][:1]}'")
    pieces = list(replies.stream(Asked("hi", history, "In verse.", stop, 1234)))
    assert pieces[-1].ended == "stop" and "".join(x.text for x in pieces).strip() == ""


def test_a_prompt_that_is_too_long_is_a_line_and_keeps_the_history(
    model: qwen_jax.LanguageModel,
) -> None:
    """And of max_new_tokens as many are generated as there is room for."""
    screen = Lines(["a", "𒀀" * 30, ":conf max_new_tokens=9999 max_window_size=0", "b " * 35])
    one = session(screen, ModelReplies(model, ntk="prompt"))
    one.settings = Settings.of(model.generation_config)
    assert one.run() == 0
    (error,) = (x for x in screen.notes if x.startswith("error"))
    assert "tokens leaves no room for a reply, as max_length is 64: ask less, drop turns" in error
    assert [x for x, _ in one.history] == ["a", ("b " * 35).strip()]
    assert re.search(r"\[\d+ tokens, .*; cut off by max_length\]", screen.notes[-1])


def run(*options: str) -> int:
    try:
        return program.main(["--ckpt", "x", *options])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def loaded(model: qwen_jax.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The command finds the model loaded."""
    monkeypatch.setattr(from_options, "describe", lambda *_, **__: model)
    monkeypatch.setattr(from_options, "load", lambda *_, **__: model)
    return monkeypatch


def test_a_pipe(loaded: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Replies and what commands say on stdout, remarks on stderr; the end is status 0."""
    typed = b"hi\n:seed\n\n:system\n:undo\nhi"
    loaded.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert run("--system", "In verse.", "--seed", "7") == 0
    out, err = capsys.readouterr()
    reply, rest = out.split("\nseed 7\nsystem message: In verse.\n")
    assert rest == f"dropped 'hi'; 0 turns left\n{reply}\n", "the same question, seed and reply"
    assert [x[:2] for x in err.splitlines()] == ["Qw", "[6", "em", "[6"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err)


def test_ctrl_c_at_the_prompt_is_status_1(loaded: pytest.MonkeyPatch) -> None:
    loaded.setattr(screens.PlainScreen, "read", lambda _: signal.raise_signal(signal.SIGINT))
    loaded.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    assert run() == 1


def test_a_closed_stdin_is_the_end_of_the_input(loaded: pytest.MonkeyPatch) -> None:
    loaded.setattr("sys.stdin", None)
    assert run() == 0


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--dtype", "float8"], 2, "--dtype: invalid choice: 'float8'"),
        (["--attention", "none"], 1, "none"),
        (["--mesh", "x=2"], 2, "--mesh"),
        (["--seed", "a"], 2, "--seed: 'a' is not a whole number"),
        (["--prompt", "a"], 2, "unknown: --prompt a"),
        ([], 1, "x"),
    ],
)
def test_usage_errors(
    options: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == code
    err = capsys.readouterr().err
    assert line in err and err.startswith("error: ") and err.count("\n") == 1


def test_which_screen_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(slave, "rb", 0) as typed, open(slave, "wb", 0, closefd=False) as shown:
        terminal, wide = io.TextIOWrapper(io.BufferedReader(typed)), io.TextIOWrapper(shown)
        monkeypatch.setattr("sys.stdin", terminal)
        assert isinstance(program.screen(), screens.PlainScreen)
        monkeypatch.setattr("sys.stdout", wide)
        assert isinstance(program.screen(), prompting.TerminalScreen)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(program.screen(), screens.PlainScreen)
        monkeypatch.undo()
    os.close(master)


class Terminal:
    """A process in a pseudo-terminal: what it has shown, and keys for it."""

    def __init__(self, command: list[str]):
        self._shown = ""
        self._master, slave = pty.openpty()
        env = environment() | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        # The first terminal that a session's first process opens is its own: Ctrl-C is for it.
        name = os.ttyname(slave)
        opened = f'exec "$@" <{name} >{name} 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", opened, "sh", *command], cwd=ROOT, env=env, start_new_session=True
        )
        self._slave = slave

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def until(self, pattern: str, prompt: bool = True) -> str:
        """Wait until what is shown matches and a prompt follows; return all since the last one."""
        deadline = time.monotonic() + LONG
        pattern += f".*?{PASTES}" if prompt else ""
        while not (found := re.search(pattern, self._shown, re.DOTALL)):
            assert time.monotonic() < deadline and self.process.poll() is None, self._shown
            if select.select([self._master], [], [], 0.2)[0]:
                self._shown += os.read(self._master, 65536).decode(errors="replace")
        self._shown = self._shown[found.end() :]
        return found.string[: found.end()]

    def close(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)


@pytest.fixture
def terminal(chat_dir: Path) -> Iterator[Terminal]:
    """The chat command in a terminal."""
    found = Terminal([*COMMAND, str(chat_dir)])
    yield found
    found.close()


@pytest.mark.slow
def test_in_a_terminal(terminal: Terminal) -> None:
    """A reply, one that Ctrl-C stops, lines of a paste, and Ctrl-C at the prompt."""
    terminal.until(":help lists the commands")
    terminal.type(":conf max_new_tokens=3\r")
    terminal.until("max_new_tokens=3\r\n")
    terminal.type("hi\r")
    shown = terminal.until(r"\[3 tokens, .* tokens/s; cut off by max_new_tokens\]")
    assert "Qwen> " in shown and "\x1b[2J" not in shown, "nothing is painted again"
    terminal.type(":conf max_new_tokens=8000\r")
    terminal.until("max_new_tokens=8000\r\n")
    terminal.type("\x1b[200~one\ntwo\x1b[201~\r")
    terminal.until("Qwen> ", prompt=False)
    terminal.type("\x03")
    terminal.until("stopped: this question and its reply are not kept")
    terminal.type(":his\r")
    history = terminal.until("=\r\n")
    assert "history: 1 turn" in history and "User[1]" not in history
    terminal.type("\x03")
    assert terminal.process.wait(LONG) == 1


@pytest.mark.slow
def test_in_a_pipe(chat_dir: Path) -> None:
    """Every line is read, without a control code, and the end of the file is status 0."""
    typed = b":conf max_new_tokens=3\nhi\n:his\nbad\xff\n:exit now\nnever\n"
    done = subprocess.run(
        [*COMMAND, str(chat_dir)], cwd=ROOT, env=environment(), input=typed, capture_output=True
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr
    assert done.stdout.count(b"User[0]: hi\n") == 1 and b"never" not in done.stdout
    assert b"[3 tokens, " in done.stderr and b"that is not UTF-8 text" in done.stderr
