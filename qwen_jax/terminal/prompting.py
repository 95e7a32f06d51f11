"""A chat's screen in a terminal: prompt_toolkit reads lines, rich shows text.

Text is only ever appended, so that nothing is painted again while a reply grows, and the terminal's
own scrolling, searching and copying work.
"""

from collections.abc import Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from qwen_jax.terminal.screens import MORE, PROMPT, visible

_SPEAKER = "Qwen> "


def keys() -> KeyBindings:
    """Return what the keys do: Enter sends, Escape with Enter begins a line.

    Enter after a backslash at the end begins a line in its place. A paste of several lines is one
    text, which Enter sends. While earlier lines are searched (Ctrl-R), Enter takes the found one.
    """
    made = KeyBindings()

    @made.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @made.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return made


class TerminalScreen:
    """A terminal. The arrow keys bring back earlier lines of this session, which no file keeps.

    commands: the names that Tab completes.
    """

    def __init__(self, commands: Sequence[str]):
        self._prompt: PromptSession[str] = PromptSession(
            FormattedText([("bold", PROMPT)]),
            multiline=True,
            key_bindings=keys(),
            prompt_continuation=MORE,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            enable_suspend=True,
        )
        self._console = Console(force_terminal=True, highlight=False, markup=False, emoji=False)

    def read(self) -> str:
        """Return the next question or command, which may have several lines."""
        return self._prompt.prompt()

    def begin_reply(self) -> None:
        """Say who speaks."""
        self._console.out(_SPEAKER, style="bold cyan", end="")
        self._console.file.flush()

    def piece(self, text: str) -> None:
        """Show the next piece of a reply."""
        self._console.out(visible(text), end="")
        self._console.file.flush()

    def end_reply(self) -> None:
        """End the line of a reply."""
        self._console.out()

    def show(self, text: str) -> None:
        """Show what a command was asked for."""
        self._console.out(visible(text))

    def note(self, text: str) -> None:
        """Show a remark, in a fainter colour."""
        self._console.print(Text(visible(text), style="dim"), soft_wrap=True)

    def clear(self) -> None:
        """Clear the screen."""
        self._console.clear()

    def width(self) -> int:
        """Return the number of columns."""
        return self._console.width
