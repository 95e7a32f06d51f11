"""What a caller asks of the engine, and the events that it gets: token ids and numbers, no text.

Everything here is plain Python, so that programs which only talk to an engine need no jax.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from qwen_jax.runtime import values

MOST_STOPS = 16  # stop ids of a request
MOST_BIASES = 300  # ids in its logit_bias
MOST_LOGPROBS = 20  # alternatives for each token


class Grammar(Protocol):
    """A rule for what a request may generate, which is moved on token by token.

    The engine asks for a mask, generates a token that the mask allows, and moves the grammar on
    with it, in this order. The engine's thread alone calls it.
    """

    def mask(self) -> Int32[np.ndarray, " words"]:
        """Return the ids that may come next: bit i % 32 of word i // 32 is 1 for id i."""
        ...

    def advance(self, token: int) -> None:
        """Move on by a token that the last mask allowed."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tokens of a request are chosen, and when it ends.

    The settings apply in this order: `grammar` and `allowed`, `logit_bias`, the three penalties,
    `temperature`, `top_k`, `top_p`, `min_p`.

    max_new_tokens: the most new tokens.
    min_new_tokens: the number of new tokens before which no stop id is generated.
    stops: the ids that end the request; () with OpenAI's or vLLM's `ignore_eos`.
    seed: of the random numbers, which depend on nothing else than it and the token's number.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens that has this probability; 1 keeps all.
    min_p: keep tokens of at least this share of the most likely token's probability.
    repetition_penalty: divides positive and multiplies negative logits of ids in the prompt or
        among the new tokens.
    presence_penalty: is subtracted from the logits of ids among the new tokens.
    frequency_penalty: is subtracted as often as an id occurs among the new tokens.
    logit_bias: numbers that are added to the logits of ids.
    allowed: the ids that may be generated; None for all that the tokenizer has.
    grammar: a further rule for ids, which depends on those before.
    logprobs: the number of most likely tokens to tell with each new one; None for no
        log-probabilities. They are of the model's own distribution, before all settings.
    prompt_logprobs: the same for the tokens of the prompt.
    scored_from: the number of the first prompt token in the results of `prompt_logprobs`.
    ntk_alpha: the factor of dynamic NTK; None takes the model's own rule for the prompt's length.
    adapter: the name of an adapter; None for the base model.
    salt: a text that keeps requests with other salts from finding this one's prefix in the cache.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    stops: Sequence[int] = ()
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed: Sequence[int] | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    scored_from: int = 1
    ntk_alpha: float | None = None
    adapter: str | None = None
    salt: str = ""

    def check(self, vocab_size: int) -> None:
        """Raise ValueError that begins with the name of the first setting out of its range.

        vocab_size: one more than the largest id.
        """
        values.whole("max_new_tokens", self.max_new_tokens, least=1, most=values.INT32)
        values.whole("min_new_tokens", self.min_new_tokens, least=0, most=values.INT32)
        values.whole("seed", self.seed, least=0, most=2**32 - 1)
        values.number("temperature", self.temperature, least=0, most=values.FLOAT32)
        values.whole("top_k", self.top_k, least=0, most=values.INT32)
        values.number("top_p", self.top_p, least=0, most=1)
        values.number("min_p", self.min_p, least=0, most=1)
        least, most = values.POSITIVE
        values.number("repetition_penalty", self.repetition_penalty, least=least, most=most)
        values.number("presence_penalty", self.presence_penalty, least=-2, most=2)
        values.number("frequency_penalty", self.frequency_penalty, least=-2, most=2)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                values.whole(name, count, least=0, most=MOST_LOGPROBS)
        values.whole("scored_from", self.scored_from, least=1)
        if self.ntk_alpha is not None:
            values.number("ntk_alpha", self.ntk_alpha, least=1, most=values.FLOAT32)
        _check_ids("stops", self.stops, below=vocab_size, most=MOST_STOPS)
        _check_ids("logit_bias", list(self.logit_bias), below=vocab_size, most=MOST_BIASES)
        for bias in self.logit_bias.values():
            values.number("logit_bias", bias, least=-100, most=100)
        if self.allowed is not None:
            _check_ids("allowed", self.allowed, below=vocab_size, most=vocab_size)
            if not self.allowed:
                raise ValueError("allowed: at least one id must be")


def _check_ids(name: str, ids: Sequence[int], *, below: int, most: int) -> None:
    """Raise ValueError if there are too many ids, or one is out of range."""
    if len(ids) > most:
        raise ValueError(f"{name}: {len(ids)} ids, at most {most} are allowed")
    values.ids(name, ids, below=below)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A token with its log-probability, and the most likely tokens in its place.

    id: the token.
    logprob: its log-probability; None where none was asked for.
    top: pairs (id, log-probability), the most likely first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Started:
    """The event that a request has got a row. It can come again, after a preemption.

    cached: the number of prompt tokens that were found in the cache.
    """

    cached: int


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """The event that the prompt's log-probabilities are known; before the first new token.

    choices: of the prompt's tokens from `scored_from` on.
    """

    choices: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last event of a request.

    reason: "stop" (by a stop id, which is the last token), "length", "cancelled" or "failed".
    error: what went wrong, in a line, if it failed.
    """

    reason: str
    error: str | None = None


Event = Started | PromptScores | Choice | Ended  # a Choice is a new token
Listener = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine has done so far, and what it has to do.

    running, waiting: requests in rows, and those without one.
    pages, used: KV cache pages in all, and those that requests hold.
    queried, hits: prompt tokens looked up in the cache, and those found there.
    preemptions: requests that had to give up their pages.
    prompt_tokens: prompt tokens that prefill has computed: without those found in the cache, and
        again for a request that had to give up its pages.
    new_tokens: tokens that were generated.
    steps: steps of the devices.
    step_tokens: how many of the steps that are over had so many tokens: prompt tokens that they
        computed and tokens that rows chose, both again after a request had to give up its pages.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    used: int = 0
    queried: int = 0
    hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    step_tokens: Mapping[int, int] = dataclasses.field(default_factory=dict)


class Generator(Protocol):
    """The interface of an engine, as a server uses it. Its methods may be called by any thread."""

    @property
    def longest(self) -> int:
        """The most tokens of a request, prompt and new ones together."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped, or hangs, in a line; None while it runs."""
        ...

    def submit(self, prompt: Sequence[int], settings: Settings, *, listener: Listener) -> int:
        """Queue a request; return its number.

        prompt: token ids, at least one.
        listener: is called with each event of the request, by the engine's thread, and must return
            at once.

        Raises ValueError for settings out of range, an unknown adapter, or more than `longest`
        tokens; RuntimeError if the engine has stopped.
        """
        ...

    def cancel(self, number: int) -> None:
        """End a request; its row is free within a step. Nothing happens if it has ended."""
        ...

    def load(self) -> Load:
        """Return the engine's figures of this moment."""
        ...
