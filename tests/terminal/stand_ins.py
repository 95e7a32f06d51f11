"""A model and a screen for chats in tests."""

from collections.abc import Iterator, Sequence

from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.terminal.chat_settings import Settings
from qwen_jax.terminal.replies import Asked, Piece
from qwen_jax.terminal.session import Session

SYSTEM = "You are a helpful assistant."
# What the original's model was loaded with.
CONFIG = {"top_p": 0.8, "top_k": 0, "do_sample": True}


class Echo:
    """Answers "reply to" a question, in three pieces, and keeps what it was asked.

    fails: what it raises for a question, after the first piece.
    """

    max_length = 100

    def __init__(self, fails: dict[str, BaseException] | None = None):
        self.asked: list[Asked] = []
        self._fails = fails or {}

    def stream(self, asked: Asked) -> Iterator[Piece]:
        self.asked.append(asked)
        yield Piece(" reply", 1)
        if asked.question in self._fails:
            raise self._fails[asked.question]
        yield Piece(" to ", 1)
        yield Piece(f"{asked.question}\n", 2)
        yield Piece("", ended="stop")

    def count(self, asked: Asked) -> tuple[int, int]:
        return 20, 20 + 10 * len(asked.history)


class Lines:
    """A screen that reads given lines, or raises those that are exceptions, and keeps its text."""

    def __init__(self, lines: Sequence[str | BaseException]):
        self._left = list(lines)
        self.clears = 0
        self.notes: list[str] = []
        self.shown: list[str] = []
        self.replies: list[str] = []

    def read(self) -> str:
        line = self._left.pop(0) if self._left else EOFError()
        if isinstance(line, str):
            return line
        raise line

    def begin_reply(self) -> None:
        self.replies.append("")

    def piece(self, text: str) -> None:
        self.replies[-1] += text

    def end_reply(self) -> None:
        self.replies[-1] += "\n"

    def show(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def clear(self) -> None:
        self.clears += 1

    def width(self) -> int:
        return 40


def session(screen: Lines, model: Echo, debug: bool = False) -> Session:
    """A chat of the stand-ins, with the seed and the settings of the original."""
    settings = Settings.of(GenerationConfig.from_hf(CONFIG))
    return Session(model, screen, settings=settings, system=SYSTEM, seed=1234, debug=debug)


def chat(
    *lines: str | BaseException, fails: dict[str, BaseException] | None = None
) -> tuple[Lines, Echo, int]:
    """Run a chat to its end; return its screen, its model and the exit status."""
    screen, model = Lines(lines), Echo(fails)
    return screen, model, session(screen, model).run()
