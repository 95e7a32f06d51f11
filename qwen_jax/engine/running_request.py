"""A request inside the engine: the scheduler's request, and what the scheduler need not know."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32

from qwen_jax.engine import outcomes, rows, scheduler
from qwen_jax.engine.pool import prefix_keys
from qwen_jax.engine.scheduler import Row
from qwen_jax.engine.settings import Choice, Event, Listener, PromptScores, Settings
from qwen_jax.model.rope import Rope
from qwen_jax.runtime import values


class GrammarError(Exception):
    """Raised if the grammar of a request fails, which ends this request alone."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Running(scheduler.Request):
    """A request that has been submitted, and has not ended.

    number: what `Engine.submit` has returned.
    frequencies: the RoPE frequencies of its row.
    allowed: the mask of ids that may be generated, but for a grammar.
    scores: the log-probabilities of its prompt's tokens that are known so far.
    """

    number: int
    settings: Settings
    listener: Listener
    frequencies: Float[np.ndarray, " pairs"]
    allowed: Int32[np.ndarray, " words"]
    scores: list[Choice] = dataclasses.field(default_factory=list)

    def mask(self) -> Int32[np.ndarray, " words"]:
        """Return the ids that the grammar and the settings allow. Raises GrammarError."""
        assert self.settings.grammar is not None
        try:
            return self.settings.grammar.mask() & self.allowed
        except BaseException as error:  # a panic of llguidance is no Exception
            raise GrammarError(f"its grammar failed: {error}") from None

    def advance(self, token: int) -> None:
        """Move the grammar on, if there is one. Raises GrammarError."""
        if self.settings.grammar is not None:
            try:
                self.settings.grammar.advance(token)
            except BaseException as error:
                raise GrammarError(f"its grammar failed: {error}") from None

    def score(
        self, begin: int, count: int, *, lines: Int32[np.ndarray, "C columns"] | None
    ) -> None:
        """Keep the log-probabilities of a chunk of the prompt; tell them after the last chunk.

        begin, count: the chunk's first token, and its number of tokens.
        lines: of `drawing.likelihoods`; None where no token of the step is scored.
        """
        if self.unscored is None or self.over:
            return
        end = begin + count
        for at in range(max(self.unscored - 1, begin), min(end, len(self.prompt) - 1)):
            assert lines is not None
            wanted = self.settings.prompt_logprobs or 0
            choice = outcomes.likely(self.prompt[at + 1], lines[at - begin], wanted=wanted)
            self.scores[at + 1 - self.unscored :] = [choice]  # again, if it was preempted
        if end == len(self.prompt):
            self.tell(PromptScores(tuple(self.scores)))

    def tell(self, event: Event) -> None:
        """Call the listener. Its error is logged, as the engine has other requests to serve."""
        try:
            self.listener(event)
        except Exception:
            log = logging.getLogger("qwen_jax")
            log.exception("the listener of request %d failed", self.number)


def checked(
    prompt: Sequence[int],
    settings: Settings,
    *,
    listener: Listener,
    number: int,
    scheme: Rope,
    known: Int32[np.ndarray, " words"],
    vocab: int,
    longest: int,
    size: int,
) -> Running:
    """Make a request of a caller's arguments. Raises ValueError for those out of their range.

    scheme: the RoPE scheme of the model.
    known: the mask of ids that the tokenizer has.
    vocab: one more than the largest id.
    longest: the most tokens, prompt and new ones together.
    size: the tokens in a page.

    The keys of the prompt's pages are computed here, in the caller's thread, so that a long prompt
    holds up no step.
    """
    settings.check(vocab)
    ids = values.ids("prompt", prompt, below=vocab)
    if not ids:
        raise ValueError("the prompt is empty: a request needs at least one token")
    total = len(ids) + settings.max_new_tokens
    if total > longest:
        raise ValueError(
            f"{len(ids)} prompt tokens and {settings.max_new_tokens} new ones are {total}: at most "
            f"{longest} fit"
        )
    alpha = settings.ntk_alpha
    if alpha is None:
        alpha = float(scheme.alpha(np.array([len(ids)]))[0])
    allowed = known
    if settings.allowed is not None:
        allowed = known & rows.bits(np.array(settings.allowed), vocab)
    identity = alpha, settings.salt, settings.adapter
    return Running(
        prompt=ids,
        limit=settings.max_new_tokens,
        identity=identity,
        keys=prefix_keys(ids, size, identity=identity),
        scored=None if settings.prompt_logprobs is None else settings.scored_from,
        paced=settings.grammar is not None,
        number=number,
        settings=settings,
        listener=listener,
        frequencies=scheme.frequencies(np.array([alpha]))[0].astype(np.float32),
        allowed=allowed,
    )


def of_row(row: Row) -> Running:
    """Return the request of a row."""
    assert isinstance(row.request, Running)
    return row.request
