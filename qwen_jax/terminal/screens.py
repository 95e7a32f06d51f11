"""Where a chat reads lines and shows text: the interface, and its form for pipes and files.

Nothing reaches a screen but `visible` text, so that a reply, a file or a name of one cannot move
the cursor, change colours or give the terminal orders. `prompting.py` has the form for terminals.
"""

import re
import shutil
import sys
from collections.abc import Callable
from typing import BinaryIO, Protocol

from qwen_jax.runtime import command, streams, texts

PROMPT, MORE = "User> ", "... "  # before a question, and before each line after its first
# Control characters by visible ones; a tab and a newline stay.
_SIGNS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """Return text for a screen: control characters, such as ESC, become signs for them."""
    return texts.printable(re.sub("\r+\n", "\n", text)).translate(_SIGNS)


class Screen(Protocol):
    """Reads what the user writes, and shows text, which it makes `visible` first."""

    def read(self) -> str:
        """Return the next question or command, which may have several lines.

        Raises EOFError at the end, KeyboardInterrupt for Ctrl-C, and UnicodeDecodeError for bytes
        that are not UTF-8.
        """
        ...

    def begin_reply(self) -> None:
        """Make ready for the pieces of a reply."""
        ...

    def piece(self, text: str) -> None:
        """Show the next piece of a reply, after those before it."""
        ...

    def end_reply(self) -> None:
        """End the line of a reply."""
        ...

    def show(self, text: str) -> None:
        """Show what a command was asked for."""
        ...

    def note(self, text: str) -> None:
        """Show a remark of the program: what it has done, a rate, an error."""
        ...

    def clear(self) -> None:
        """Clear the screen, where there is one."""
        ...

    def width(self) -> int:
        """Return the number of columns."""
        ...


def joined(next_line: Callable[[], str]) -> str:
    """Read a text of one line or several: a backslash at a line's end continues it.

    next_line: returns the next line without its end. EOFError after a backslash ends the text.
    """
    lines = [next_line()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(next_line())
        except EOFError:
            break
    return "\n".join(lines)


class PlainScreen:
    """Lines of a pipe or a file: replies and results go to stdout, remarks to stderr.

    source: where questions come from, as bytes in UTF-8.
    prompts: whether a question is asked for on stderr, for a terminal whose output goes elsewhere.
    """

    def __init__(self, source: BinaryIO, *, prompts: bool = False):
        self._source, self._prompts = source, prompts

    def read(self) -> str:
        """Return the next question or command: a line, with those that it is continued on."""
        prompt = PROMPT

        def next_line() -> str:
            nonlocal prompt
            if self._prompts:
                print(prompt, end="", file=streams.lenient(sys.stderr), flush=True)
            line, prompt = self._source.readline(), MORE
            if not line:
                raise EOFError
            return line.decode().removeprefix("\ufeff").rstrip("\r\n")

        return joined(next_line)

    def begin_reply(self) -> None:
        """Do nothing: a reply begins on a line of its own."""

    def piece(self, text: str) -> None:
        """Show the next piece of a reply."""
        print(visible(text), end="", flush=True)

    def end_reply(self) -> None:
        """End the line of a reply."""
        print(flush=True)

    def show(self, text: str) -> None:
        """Print what a command was asked for."""
        print(visible(text), flush=True)

    def note(self, text: str) -> None:
        """Print a remark to stderr."""
        command.say(visible(text))

    def clear(self) -> None:
        """Do nothing: there is no screen."""

    def width(self) -> int:
        """Return the number of columns: $COLUMNS, or 80."""
        return shutil.get_terminal_size().columns
