"""A chat: a loop of questions and commands. It knows neither the model nor the terminal."""

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.runtime import paths, texts
from qwen_jax.terminal import answering, command_table, messages_file
from qwen_jax.terminal.chat_settings import Settings
from qwen_jax.terminal.replies import Asked, Replies
from qwen_jax.terminal.screens import Screen

_QUESTION_WIDTH = 60  # the most characters of a dropped question that `:undo` shows
_NO_DRAWS = (
    "note: no token is drawn (do_sample=false, or temperature=0), so the seed, top_k and top_p "
    "have no effect"
)


class Session:
    """A conversation, and what its next reply depends on.

    replies: the model.
    screen: where lines are read and text is shown.
    settings: those of the start.
    system: the text of the system message.
    seed: set anew before every reply, so that the same history and question have the same reply.
    welcome: shown at the start and by `:clear`.
    debug: whether an error of the model ends the chat, with its traceback.
    """

    def __init__(
        self,
        replies: Replies,
        screen: Screen,
        *,
        settings: Settings,
        system: str,
        seed: int,
        welcome: str = "",
        debug: bool = False,
    ):
        self._replies, self._screen = replies, screen
        self._start, self._welcome, self._debug = settings, welcome, debug
        self.settings, self.system, self.seed = settings, system, seed
        self.history: list[tuple[str, str]] = []
        self._unanswered: str | None = None  # the last question, if its reply was not kept
        self._replied_with: int | None = None  # the seed of the last reply

    def run(self) -> int:
        """Answer questions and obey commands until the end; return the exit status.

        It is 0 after `:exit` and at the end of the input, and 1 after Ctrl-C at the prompt.
        """
        self._screen.note(self._welcome)
        while True:
            try:
                text = self._read()
                command = command_table.split(text)
                if command is None:
                    self._ask(text, self.history)
                elif command[0] == "exit":
                    return 0
                else:
                    self._obey(*command)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                return 1

    def _read(self) -> str:
        """Return the next question or command, without the white space around it."""
        while True:
            try:
                if text := texts.check_whole("the question", self._screen.read()).strip():
                    return text
                self._screen.note("empty: write a question, or :help")
            except UnicodeDecodeError:
                self._screen.note("error: that is not UTF-8 text: write it again")
            except ValueError as error:
                self._screen.note(f"error: {error}")

    def _obey(self, name: str, rest: str) -> None:
        """Run a command, and show what it says, or in one line what is wrong with it."""
        do = getattr(self, f"_{name.replace('-', '_').replace('!', '_over')}")
        try:
            said = do(rest)
        except ValueError as error:
            self._screen.note(f"error: {texts.brief(' '.join(str(error).split()))}")
        else:
            if said is not None:
                self._screen.show(said)

    def _asked(self, question: str, history: Sequence[tuple[str, str]]) -> Asked:
        return Asked(question, tuple(history), self.system, self.settings, self.seed)

    def _ask(self, question: str, before: list[tuple[str, str]]) -> None:
        """Show the reply to a question, and keep the turn once the reply is whole.

        before: the turns that it follows, which replace the history together with the new one.

        After Ctrl-C or an error of the model the history stays as it was.
        """
        try:
            made = answering.answer(self._replies, self._screen, self._asked(question, before))
        except answering.DroppedError as dropped:
            if self._debug and dropped.__cause__:
                raise dropped.__cause__ from None
            if before is self.history:
                self._unanswered = question
            self._screen.note(str(dropped))
            return
        self.history = [*before, (question, made.text)]
        self._unanswered, self._replied_with = None, self.seed
        self._screen.note(made.report)

    def _help(self, _: str) -> str:
        return command_table.help_text()

    def _clear(self, _: str) -> None:
        self._screen.clear()
        self._screen.note(self._welcome)

    def _clear_his(self, _: str) -> str:
        count, self.history, self._unanswered = len(self.history), [], None
        return f"{_turns(count)} forgotten"

    def _history(self, _: str) -> str:
        width = self._screen.width()
        lines = [f" history: {_turns(len(self.history))} ".center(width, "=")]
        for number, (question, reply) in enumerate(self.history):
            lines += [f"User[{number}]: {question}", f"Qwen[{number}]: {reply}"]
        return "\n".join([*lines, "=" * width])

    def _seed(self, rest: str) -> str:
        if rest:
            word = rest.split()[0]
            try:
                self.seed = int(word)
            except ValueError:
                shown = texts.shown(word)
                raise ValueError(
                    f":seed {shown}: must be a whole number; it stays {self.seed}"
                ) from None
        return f"seed {self.seed}"

    def _conf(self, rest: str) -> str:
        self.settings = self.settings.changed(rest)
        if rest and not self.settings.draws:
            self._screen.note(_NO_DRAWS)
        return str(self.settings)

    def _reset_conf(self, _: str) -> str:
        self.settings = self._start
        return str(self.settings)

    def _system(self, rest: str) -> str:
        if rest:
            self.system = command_table.unquoted(rest)
        return f"system message: {self.system}"

    def _retry(self, _: str) -> None:
        """Ask the last question again; a turn that was kept is replaced once the reply is whole.

        The seed that had the reply would have it again, so the next one is taken.
        """
        if self._unanswered is not None:
            self._ask(self._unanswered, self.history)
            return
        if not self.history:
            raise ValueError("there is no question to ask again")
        if self.seed == self._replied_with:
            self.seed += 1
        self._screen.note(f"seed {self.seed}" if self.settings.draws else _NO_DRAWS)
        self._ask(self.history[-1][0], self.history[:-1])

    def _undo(self, _: str) -> str:
        if not self.history:
            raise ValueError("there is no turn to drop")
        (question, _reply), self._unanswered = self.history.pop(), None
        shown = question
        if len(question) > _QUESTION_WIDTH:
            shown = f"{question[: _QUESTION_WIDTH - 3]}..."
        return f"dropped {' '.join(shown.split())!r}; {_turns(len(self.history))} left"

    def _save(self, rest: str, *, replace: bool = False) -> str:
        path = _path(":save", rest)
        replaced = messages_file.write(path, self.history, system=self.system, replace=replace)
        what = "the file that was there is replaced" if replaced else "a new file"
        return f"{_turns(len(self.history))} saved to {path}, {what}"

    def _save_over(self, rest: str) -> str:
        return self._save(rest, replace=True)

    def _load(self, rest: str) -> str:
        path = _path(":load", rest)
        system, history = messages_file.read(path, self.system)
        said = f"{_turns(len(history))} read from {path}"
        if self.history:
            said += f", in place of {_turns(len(self.history))}"
        if system != self.system:
            said += "; the system message is the file's"
        self.system, self.history = system, history
        self._unanswered, self._replied_with = None, self.seed
        return said

    def _tokens(self, _: str) -> str:
        sent, whole = self._replies.count(self._asked("", self.history))
        most = self._replies.max_length
        window = self.settings.given["max_window_size"]
        cut = (
            f" (all turns would have {whole}: max_window_size is {window})" if whole > sent else ""
        )
        return (
            f"{_turns(len(self.history))} and the system message: a prompt of {sent} tokens{cut}; "
            f"{max(most - sent, 0)} of {most} are left for a question and its reply"
        )


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


def _path(command: str, rest: str) -> Path:
    """Parse the name of a file, which may be quoted and begin with ~."""
    if not (name := command_table.unquoted(rest)):
        raise ValueError(f"{command}: name a file: {command} FILE")
    return paths.parse(os.path.expanduser(name))
