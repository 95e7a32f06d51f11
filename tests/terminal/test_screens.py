"""Reading lines from pipes and terminals, and text that cannot give a terminal orders."""

import io
import re
import signal
from collections.abc import Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwen_jax.terminal import prompting
from qwen_jax.terminal.screens import PlainScreen, visible

# Colours, a title, the clipboard, 8-bit CSI, a cursor that goes back, and a bell.
ORDERS = "a\x1b[31mb\x1b]0;t\x07\x1b]52;c;eA==\x1b\\\x9b2Jc\rd\b\x7f\x00"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    """What is typed in a terminal, where screens that are made meanwhile show nothing."""
    with create_pipe_input() as made, create_app_session(input=made, output=DummyOutput()):
        yield made


def lines_of(source: bytes, **options: bool) -> list[str]:
    """All that a plain screen reads."""
    screen, found = PlainScreen(io.BytesIO(source), **options), []
    while True:
        try:
            found.append(screen.read())
        except EOFError:
            return found


def test_lines_of_a_pipe() -> None:
    assert lines_of("\ufeffa\r\n\n b \nend".encode()) == ["a", "", " b ", "end"]
    assert lines_of(b"one\\\ntwo\\\r\n three\nfour\\") == ["one\ntwo\n three", "four"]
    assert lines_of(b"C:\\ \nx\n") == ["C:\\ ", "x"], "a space after it keeps a backslash"


def test_bytes_that_are_not_utf_8_are_refused_alone() -> None:
    screen = PlainScreen(io.BytesIO(b"a\xff\nok\n"))
    with pytest.raises(UnicodeDecodeError):
        screen.read()
    assert screen.read() == "ok"


def test_a_terminal_whose_output_goes_elsewhere_is_asked_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines_of(b"a\\\nb\n", prompts=True)
    assert capsys.readouterr() == ("", "User> ... User> ")


def test_control_characters_become_signs(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("a\tb\nc\r\nd\r\r\ne 你好 \U0001f40b") == "a\tb\nc\nd\ne 你好 \U0001f40b"
    assert visible(ORDERS) == "a␛[31mb␛]0;t␇␛]52;c;eA==␛\\\\x9b2Jc␍d␈␡␀"
    for screen in (PlainScreen(io.BytesIO()), prompting.TerminalScreen([])):
        for show in (screen.piece, screen.show, screen.note):
            show(ORDERS)
            said = "".join(capsys.readouterr())
            said = re.sub(r"\x1b\[\d*m", "", said)  # rich's own colours
            assert said.rstrip("\n") == visible(ORDERS)


def test_a_plain_screen_has_no_control_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = PlainScreen(io.BytesIO())
    screen.clear()
    screen.begin_reply()
    screen.piece("a")
    screen.piece(" b")
    screen.end_reply()
    screen.note("remark")
    assert capsys.readouterr() == ("a b\n", "remark\n")
    monkeypatch.setenv("COLUMNS", "33")
    assert screen.width() == 33


def test_a_terminal_shows_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither wrapped, nor coloured, nor with rich's markup; pieces follow each other."""
    screen, text = prompting.TerminalScreen([]), "[bold]:smile: 12 " + "long " * 60
    screen.begin_reply()
    for piece in (text, "é", " end"):
        screen.piece(piece)
    screen.end_reply()
    assert capsys.readouterr().out.endswith(f"Qwen> \x1b[0m{text}é end\n")
    screen.note(text)
    assert re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out) == f"{text}\n"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("hi\r", "hi"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\r two\\\r\r", "one\n two\n"),
        ("\x1b[200~one\r\n\ttwo\\\nthree\x1b[201~ end\r", "one\n\ttwo\\\nthree end"),
        ("a\\\x1b[Db\r", "ab\\"),  # the backslash is after the cursor
    ],
)
def test_keys_of_a_terminal(typed: str, read: str, keyboard: PipeInput) -> None:
    screen = prompting.TerminalScreen([])
    keyboard.send_text(typed)
    assert screen.read() == read


def test_tab_completes_commands(keyboard: PipeInput) -> None:
    completer = prompting.TerminalScreen([":clear", ":clear-his"])._prompt.completer
    assert completer is not None
    found = completer.get_completions(Document(":clear-"), CompleteEvent())
    assert [x.text for x in found] == [":clear-his"]


def test_the_arrow_brings_back_an_earlier_line(keyboard: PipeInput) -> None:
    screen = prompting.TerminalScreen([])
    keyboard.send_text("first\r")
    screen.read()
    keyboard.send_text("\x1b[A again\r")
    assert screen.read() == "first again"


def test_enter_takes_an_earlier_line_that_is_searched(keyboard: PipeInput) -> None:
    screen = prompting.TerminalScreen([])
    keyboard.send_text("first\r")
    screen.read()
    # Ctrl-R. The cursor is where the found text begins. A search that goes on is ended by Ctrl-G.
    keyboard.send_text("\x12fir\r again\r\x07\x04")
    assert screen.read() == " againfirst"


@pytest.mark.parametrize(("typed", "raised"), [("a\x03", KeyboardInterrupt), ("\x04", EOFError)])
def test_ends_of_a_terminal(typed: str, raised: type[BaseException], keyboard: PipeInput) -> None:
    before = signal.getsignal(signal.SIGINT)
    screen = prompting.TerminalScreen([])
    keyboard.send_text(typed)
    with pytest.raises(raised):
        screen.read()
    assert signal.getsignal(signal.SIGINT) is before
