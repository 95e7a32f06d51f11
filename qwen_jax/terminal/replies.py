"""Replies of a model to the questions of a chat, in pieces as they are generated."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from qwen_jax import chat
from qwen_jax.generate.completion import Row, TextRules
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.runtime import values
from qwen_jax.terminal.chat_settings import Settings


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question with all that its reply depends on.

    question: the user's text.
    history: pairs (question, reply), the oldest first.
    system: the text of the system message.
    settings: how the reply is generated.
    seed: the seed of its random numbers.
    """

    question: str
    history: Sequence[tuple[str, str]]
    system: str
    settings: Settings
    seed: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next piece of a reply.

    text: the text that it adds, which may be empty.
    tokens: the number of tokens that were generated for it.
    ended: why the reply is over, "stop" or "length"; None if it is not.
    """

    text: str
    tokens: int = 0
    ended: str | None = None


class Replies(Protocol):
    """What a chat needs of a model. `ModelReplies` is one; tests have another."""

    max_length: int  # the most tokens of a prompt and its reply together

    def stream(self, asked: Asked) -> Iterator[Piece]:
        """Yield the pieces of a reply. Raises ValueError for a prompt that does not fit."""
        ...

    def count(self, asked: Asked) -> tuple[int, int]:
        """Return the number of tokens of the prompt, and what it would be with all turns."""
        ...


class ModelReplies:
    """Replies of a loaded model.

    ntk: "prompt" or "total", the length from which dynamic NTK computes its alpha.
    """

    def __init__(self, model: LanguageModel, *, ntk: str):
        self._model, self._ntk = model, ntk
        self.max_length = model.max_length

    def stream(self, asked: Asked) -> Iterator[Piece]:
        """Yield the pieces of a reply, the last of which says why it ended.

        A reply has fewer than `max_new_tokens` tokens where the model has no room for more. Raises
        ValueError for a prompt that leaves room for none.
        """
        model, config = self._model, asked.settings.config
        ids = self._ids(asked, config.max_window_size)
        left = model.max_length - len(ids)
        if left < 1:
            raise ValueError(
                f"a prompt of {len(ids)} tokens leaves no room for a reply, as max_length is "
                f"{model.max_length}: ask less, drop turns by :undo, :clear-his or :conf "
                "max_window_size=N, or start with a larger --max-length"
            )
        stops = model.chat_stops()
        rules = TextRules(config.sampler, stops, asked.settings.stop, self._ntk)
        row = Row(model.need_tokenizer(), rules)
        parts = model.stream(
            [ids],
            max_new_tokens=min(config.max_new_tokens, left),
            sampler=config.sampler,
            stop=stops,
            seed=asked.seed,
            ntk=self._ntk,
        )
        for part in parts:
            before = len(row.tokens)
            text = row.push(part[0].tolist())
            yield Piece(text, len(row.tokens) - before)
            if row.stopped:
                break
        yield Piece(row.finish(), ended=row.finish_reason)

    def count(self, asked: Asked) -> tuple[int, int]:
        """Return the number of tokens of the prompt, and what it would be with all turns."""
        window = asked.settings.config.max_window_size
        return len(self._ids(asked, window)), len(self._ids(asked, values.INT64))

    def _ids(self, asked: Asked, window: int) -> list[int]:
        tokenizer = self._model.need_tokenizer()
        return chat.make_context(tokenizer, asked.question, asked.history, asked.system, window)[1]
