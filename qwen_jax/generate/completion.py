"""Batched text completion: many prompts in batches, in order, each with the result it has alone.

Stop texts are found here, on the host; stop ids are found here and on the device. `generate_text`
is a method of `LanguageModel`; the rest of this module does not know how a prompt was encoded or
where results go.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from qwen_jax.chat import StopIds, StopText, stop_texts
from qwen_jax.chat.tokenizer import TextStream, Tokenizer
from qwen_jax.decoding import inputs
from qwen_jax.decoding.sampling import Sampler
from qwen_jax.generate import keywords
from qwen_jax.runtime import texts, values

if TYPE_CHECKING:
    from qwen_jax.generate.language_model import LanguageModel

BATCH_SIZE = 8  # texts that run at once by default
_AT_ONCE = 8  # tokens generated between two searches for stop texts


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    ids: the token ids of the prompt.
    seed: the seed of this text's sampling.
    new: the largest number of tokens to generate.
    """

    ids: Sequence[int]
    seed: int
    new: int


@dataclasses.dataclass(frozen=True)
class TextRules:
    """The settings that all requests of a call share.

    sampler: a `Greedy` or a `Nucleus`.
    stops: sequences of token ids that end a text.
    stop_texts: texts that end a text.
    ntk: "prompt" or "total", the length from which dynamic NTK computes its alpha.
    """

    sampler: Sampler
    stops: Sequence[Sequence[int]]
    stop_texts: Sequence[str] = ()
    ntk: str = "prompt"


class Row:
    """One text of a batch, built up as its token ids are generated.

    tokens: the ids so far, including the stop that ended them.
    text: the decoded text, without an end that may still turn out to be part of a stop.
    """

    def __init__(self, tokenizer: Tokenizer, rules: TextRules):
        self.tokens: list[int] = []
        self.text = ""
        self._ids, self._texts = StopIds(rules.stops), StopText(rules.stop_texts)
        self._stream = TextStream(tokenizer, skip_special_tokens=True)

    @property
    def stopped(self) -> bool:
        """Whether a stop has ended the text."""
        return self._ids.matched is not None or self._texts.matched is not None

    @property
    def finish_reason(self) -> str:
        """Why the text ended: "stop" for a stop, "length" for the limit on new tokens."""
        return "stop" if self.stopped else "length"

    def push(self, ids: Iterable[int]) -> str:
        """Append the next ids, up to a stop, and return the text that they add."""
        before = len(self.text)
        for i in ids:
            if self.stopped:
                break
            self.tokens.append(int(i))
            self.text += self._texts.push(self._stream.push(self._ids.push([i])))
        return self.text[before:]

    def finish(self) -> str:
        """End the text, and return the part held back because it might have begun a stop."""
        rest = self._stream.push(self._ids.flush()) + self._stream.flush()
        rest = self._texts.push(rest) + self._texts.flush()
        self.text += rest
        return rest


def run(
    model: "LanguageModel", requests: Sequence[Request], *, rules: TextRules, batch_size: int
) -> Iterator[list[Row]]:
    """Generate texts for all requests; yield the finished rows in order, one batch at a time.

    rules: the settings that all requests share.
    batch_size: the largest number of requests in a batch.

    Only consecutive requests with equal `new` share a batch, so that a row's limit does not depend
    on its neighbours. A partial batch is filled with copies of its rows, whose results are dropped,
    because programs are compiled for a fixed number of rows.
    """
    width = min(batch_size, len(requests))
    for new, group in itertools.groupby(requests, key=lambda request: request.new):
        waiting = list(group)
        for begin in range(0, len(waiting), width):
            yield _batch(model, waiting[begin : begin + width], rules=rules, new=new, width=width)


def _batch(
    model: "LanguageModel", requests: Sequence[Request], *, rules: TextRules, new: int, width: int
) -> list[Row]:
    """Generate one batch of texts, and return a finished row for each request.

    rules: the settings that all requests share.
    new: the largest number of tokens to generate for each request.
    width: the number of rows in the batch, which is filled up with copies of requests.
    """
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


@overload
def generate_text(
    self: "LanguageModel",
    prompts: str,
    max_new_tokens: int | None = ...,
    *,
    sampler: Sampler | None = ...,
    stop: str | Sequence[str] = ...,
    seed: int | Sequence[int] = ...,
    ntk: str = ...,
    batch_size: int = ...,
) -> str: ...
@overload
def generate_text(
    self: "LanguageModel",
    prompts: Sequence[str],
    max_new_tokens: int | None = ...,
    *,
    sampler: Sampler | None = ...,
    stop: str | Sequence[str] = ...,
    seed: int | Sequence[int] = ...,
    ntk: str = ...,
    batch_size: int = ...,
) -> list[str]: ...
@keywords.explained
def generate_text(
    self: "LanguageModel",
    prompts: str | Sequence[str],
    max_new_tokens: int | None = None,
    *,
    sampler: Sampler | None = None,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    ntk: str = "prompt",
    batch_size: int = BATCH_SIZE,
) -> str | list[str]:
    """Continue one text or several. Returns the new text only, without the stop that ended it.

    Arguments that are None come from the checkpoint's generation_config, whose stops always apply.
    Control tokens spelled out in a prompt are ordinary text. For a chat model use `chat`.

    Args:
        prompts: a text, or texts of any lengths, which run `batch_size` at a time. The result for
            each is the same as if it ran alone.
        max_new_tokens: the largest number of tokens to generate for each text.
        sampler: a `Greedy` or a `Nucleus`.
        stop: a text or texts that end a result, even where they begin or end within a token.
        seed: one seed for all texts, or one for each. To draw several samples of a prompt, repeat
            it with different seeds.
        ntk: dynamic NTK computes alpha from the length of the "prompt", as the original code does,
            or from the "total" of prompt and new tokens.
        batch_size: the number of texts that run at once.

    Raises ValueError that names an argument which is not text, is empty, or does not fit.
    """
    given = [prompts] if isinstance(prompts, str) else inputs.prompts(prompts)
    tokenizer = self.need_tokenizer()
    width = values.whole("batch_size", batch_size, least=1)
    seeds = inputs.seeds(seed, len(given))
    requests = []
    for number, text in enumerate(given):
        name = "the prompt" if isinstance(prompts, str) else f"prompt {number}"
        ids = tokenizer.encode(texts.check_whole(name, text))
        if not ids:
            raise ValueError(f"{name} is empty: give some text")
        with values.named(name):
            new = self.room(len(ids), max_new_tokens)
        requests.append(Request(ids, int(seeds[number]), new))
    rules = TextRules(
        sampler=self.generation_config.sampler if sampler is None else sampler,
        stops=self.generation_config.stops,
        stop_texts=stop_texts(stop),
        ntk=ntk,
    )
    made = [row.text for rows in run(self, requests, rules=rules, batch_size=width) for row in rows]
    return made[0] if isinstance(prompts, str) else made
