"""The text of one sequence as its tokens come: whole characters, up to the first stop."""

import dataclasses
from collections.abc import Collection, Sequence

from qwen_jax.chat.stops import StopText
from qwen_jax.chat.tokenizer import TextStream, Tokenizer
from qwen_jax.engine.settings import Choice, Ended, Event, PromptScores


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text.

    start: the characters before it. A token that only continues a character has the character's.
    """

    choice: Choice
    start: int


@dataclasses.dataclass
class Piece:
    """What came of a text since the last piece.

    text: whole characters, none of which can be part of a stop.
    tokens: those whose text has begun by now.
    ids: all tokens that were generated, those of a stop, too.
    """

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)


class Draft:
    """Makes text of the events of one sequence.

    stop_ids: the ids that end it.
    stops: the texts that end it. Before `least` tokens they are not looked for.
    skip_special_tokens: whether control tokens are left out.
    with_stop: whether the stop is part of the text.
    all_tokens: whether tokens of a stop are told as well, which is what legacy completions do.

    reason: "stop" or "length" at its end; None before it.
    stop: the text or id of the request that ended it; None for the model's own end.
    scores: the log-probabilities of the prompt's tokens.
    ids: all tokens so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_ids: Collection[int] = (),
        own_ids: Collection[int] = (),
        stops: Sequence[str] = (),
        least: int = 0,
        skip_special_tokens: bool = True,
        with_stop: bool = False,
        all_tokens: bool = False,
    ):
        self._stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop_ids, self._own_ids = frozenset(stop_ids), frozenset(own_ids)
        self._stops, self._least = StopText(stops), least
        self._with_stop, self._all = with_stop, all_tokens
        self._decoded = self._shown = 0
        self._pending: list[Token] = []
        self.ids: list[int] = []
        self.scores: tuple[Choice, ...] = ()
        self.reason: str | None = None
        self.stop: str | int | None = None

    def add(self, events: Sequence[Event]) -> Piece:
        """Add events; return what is new. After the end, nothing is."""
        piece = Piece()
        for event in events:
            if self.reason is not None:
                break
            if isinstance(event, Choice):
                self._token(event, piece)
            elif isinstance(event, PromptScores):
                self.scores = event.choices
            elif isinstance(event, Ended):
                self._end(piece, event.reason)
        self._release(piece)
        return piece

    def _token(self, choice: Choice, piece: Piece) -> None:
        self.ids.append(choice.id)
        piece.ids.append(choice.id)
        ends = choice.id in self._stop_ids
        if not ends or self._all:
            self._pending.append(Token(choice, self._decoded))
        if not ends or self._with_stop:
            text = self._stream.push((choice.id,))
            self._decoded += len(text)
            self._show(text, piece)
        if ends and self.reason is None:
            if choice.id not in self._own_ids:
                self.stop = choice.id
            self._end(piece, "stop")

    def _show(self, text: str, piece: Piece) -> None:
        """Show new text, but for what may be part of a stop."""
        early = len(self.ids) <= self._least
        text = text if early else self._stops.push(text)
        if (found := self._stops.matched) is not None:
            text += found if self._with_stop else ""
            self.reason, self.stop = "stop", found
        self._shown += len(text)
        piece.text += text

    def _end(self, piece: Piece, reason: str) -> None:
        """Show what was held back, as nothing more comes."""
        rest = self._stream.flush()
        self._decoded += len(rest)
        self._show(rest, piece)
        if self.reason is None:
            held = self._stops.flush()
            self._shown += len(held)
            piece.text += held
            self._shown = max(self._shown, self._decoded) + 1  # tokens without text go, too
            self.reason = reason

    def _release(self, piece: Piece) -> None:
        """Tell the tokens whose text has begun to be shown."""
        if self.reason is not None and self._all:
            count = len(self._pending)
        else:
            count = next(
                (n for n, token in enumerate(self._pending) if token.start >= self._shown),
                len(self._pending),
            )
        piece.tokens += self._pending[:count]
        del self._pending[:count]
