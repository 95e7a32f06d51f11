"""Many prompts as ids to texts: in batches, in order, each as it would be alone.

What ends a row is found here where it is a text; ids that end one are found on the device, too.
This module knows neither how a prompt was encoded nor where results go.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.chat import StopIds, StopText
from qwen_jax.chat.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from qwen_jax.generate.language_model import LanguageModel

BATCH_SIZE = 8  # rows that run at once where nobody says how many
_AT_ONCE = 8  # tokens between two looks at the texts


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and what is drawn after it. `ids`: of the prompt; `seed`: of the row's draws;
    `new`: the most tokens to make.
    """

    ids: Sequence[int]
    seed: int
    new: int


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is the same for all requests. `sampler`: a Greedy or a Nucleus; `stops`: sequences of
    ids that end a row; `stop_texts`: texts that do; `ntk`: as of `LanguageModel.generate`.
    """

    sampler: Any
    stops: Sequence[Sequence[int]]
    stop_texts: Sequence[str] = ()
    ntk: str = "prompt"


class Row:
    """One row as its ids come. `tokens`: the ids so far, with the stop that has ended them;
    `text`: what is known to come before a stop.
    """

    def __init__(self, tokenizer: Tokenizer, rules: Rules):
        self.tokens: list[int] = []
        self.text = ""
        self._ids, self._texts = StopIds(rules.stops), StopText(rules.stop_texts)
        self._stream = TextStream(tokenizer, skip_special_tokens=True)

    @property
    def stopped(self) -> bool:
        """Whether a stop has ended the row."""
        return self._ids.matched is not None or self._texts.matched is not None

    @property
    def finish_reason(self) -> str:
        """Why the row has ended: "stop", or "length"."""
        return "stop" if self.stopped else "length"

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids, as far as the row goes; the text that they add."""
        before = len(self.text)
        for i in ids:
            if self.stopped:
                break
            self.tokens.append(int(i))
            self.text += self._texts.push(self._stream.push(self._ids.push([i])))
        return self.text[before:]

    def finish(self) -> str:
        """The text that was held back, when no more ids come."""
        rest = self._stream.push(self._ids.flush()) + self._stream.flush()
        rest = self._texts.push(rest) + self._texts.flush()
        self.text += rest
        return rest


def run(
    model: "LanguageModel", requests: Sequence[Request], rules: Rules, batch_size: int
) -> Iterator[list[Row]]:
    """Yield the finished rows of all requests, in their order, a batch at a time.

    Requests of one length of `new` that follow each other share a batch, so that a row's room does
    not depend on its neighbours. A batch that is not full is filled up with rows that it has, as
    programs are compiled for a number of rows; these are dropped.
    """
    width = min(batch_size, len(requests))
    for new, group in itertools.groupby(requests, key=lambda request: request.new):
        waiting = list(group)
        for begin in range(0, len(waiting), width):
            yield _batch(model, waiting[begin : begin + width], rules, new, width)


def _batch(
    model: "LanguageModel", requests: Sequence[Request], rules: Rules, new: int, width: int
) -> list[Row]:
    """The finished rows of one batch of `width` rows."""
    filled = list(itertools.islice(itertools.cycle(requests), width))
    rows = [Row(model.need_tokenizer(), rules) for _ in requests]
    parts = model.stream(
        [list(request.ids) for request in filled],
        max_new_tokens=new,
        sampler=rules.sampler,
        stop=rules.stops,
        seed=[request.seed for request in filled],
        ntk=rules.ntk,
        at_once=_AT_ONCE,
    )
    for part in parts:
        for row, ids in zip(rows, part, strict=False):
            row.push(ids.tolist())
        if all(row.stopped for row in rows):
            break
    for row in rows:
        row.finish()
    return rows
