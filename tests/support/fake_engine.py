"""An engine without a model: a thread that answers with scripted tokens, as the real one would."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from qwen_jax.engine.settings import (
    Choice,
    Ended,
    Listener,
    Load,
    PromptScores,
    Settings,
    Started,
)

Script = Callable[[Sequence[int], Settings], Sequence[int]]


@dataclasses.dataclass(eq=False)
class _Running:
    number: int
    prompt: Sequence[int]
    settings: Settings
    listener: Listener
    tokens: list[int]
    sent: int = 0
    started: bool = False


class FakeEngine:
    """Answers each request with the tokens of a script, one a step, in steps of all requests.

    script: takes a prompt and its settings, and returns the tokens; a request that asks for more
        gets the first stop id then, or the script again.
    rows: the requests that run at once; others wait.
    pause: seconds between steps.
    cached: the prompt tokens of each request that count as found in the cache.
    With `stepwise`, a step is only made when `step` is called.
    """

    def __init__(
        self,
        script: Script,
        *,
        longest: int = 4096,
        vocab_size: int = 512,
        rows: int = 64,
        pause: float = 0.0,
        cached: int = 0,
        stepwise: bool = False,
    ):
        self.script, self._longest, self.vocab_size = script, longest, vocab_size
        self.rows, self.pause, self.cached = rows, pause, cached
        self.submitted: list[tuple[list[int], Settings]] = []
        self.cancelled: list[int] = []
        self.adapters: set[str] = set()
        self._failure: str | None = None
        self._live: list[_Running] = []
        self._lock = threading.Condition()
        self._over = False
        self._new_tokens = self._steps = self._prompt_tokens = 0
        self._sizes: collections.Counter[int] = collections.Counter()
        self._thread = threading.Thread(target=self._work, daemon=True)
        if not stepwise:
            self._thread.start()

    @property
    def longest(self) -> int:
        """The most tokens of a request."""
        return self._longest

    @property
    def failure(self) -> str | None:
        """Why it has stopped."""
        return self._failure

    def submit(self, prompt: Sequence[int], settings: Settings, *, listener: Listener) -> int:
        """Queue a request."""
        settings.check(self.vocab_size)
        if settings.adapter is not None and settings.adapter not in self.adapters:
            raise ValueError(f"adapter {settings.adapter!r} is not known")
        if len(prompt) + settings.max_new_tokens > self._longest:
            raise ValueError(f"{len(prompt)} prompt tokens: too many")
        with self._lock:
            if self._failure is not None:
                raise RuntimeError(self._failure)
            number = len(self.submitted)
            self.submitted.append((list(prompt), settings))
            tokens = list(self.script(prompt, settings))
            self._live.append(_Running(number, prompt, settings, listener, tokens))
            self._lock.notify()
            return number

    def cancel(self, number: int) -> None:
        """End a request."""
        with self._lock:
            for one in self._live:
                if one.number == number:
                    self._live.remove(one)
                    self.cancelled.append(number)
                    one.listener(Ended("cancelled"))
                    return

    def load(self) -> Load:
        """Return figures."""
        with self._lock:
            running = min(len(self._live), self.rows)
            return Load(
                running=running,
                waiting=len(self._live) - running,
                pages=100,
                used=running,
                queried=self._prompt_tokens,
                hits=0,
                prompt_tokens=self._prompt_tokens,
                new_tokens=self._new_tokens,
                steps=self._steps,
                step_tokens=self._sizes.copy(),
            )

    def fail(self, why: str) -> None:
        """Die as an engine does whose thread has an error."""
        with self._lock:
            self._failure = why
            for one in self._live:
                one.listener(Ended("failed", why))
            self._live.clear()
            self._lock.notify()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._over = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> None:
        """Generate a token of each running request."""
        with self._lock:
            self._steps += 1
            before = self._prompt_tokens + self._new_tokens
            for one in self._live[: self.rows]:
                self._advance(one)
            self._sizes[self._prompt_tokens + self._new_tokens - before] += 1

    def _advance(self, one: _Running) -> None:
        settings = one.settings
        if not one.started:
            one.started = True
            self._prompt_tokens += len(one.prompt)
            one.listener(Started(self.cached))
            if settings.prompt_logprobs is not None:
                scored = one.prompt[settings.scored_from :]
                told = tuple(self._choice(i, settings.prompt_logprobs) for i in scored)
                one.listener(PromptScores(told))
        token = self._token(one)
        if settings.grammar is not None:
            mask = settings.grammar.mask()
            if not mask[token // 32] >> (token % 32) & 1:
                bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
                token = int(bits.nonzero()[0][-1])
            settings.grammar.advance(token)
        one.sent += 1
        self._new_tokens += 1
        one.listener(self._choice(token, settings.logprobs))
        if token in settings.stops or one.sent == settings.max_new_tokens:
            self._live.remove(one)
            one.listener(Ended("stop" if token in settings.stops else "length"))

    def _token(self, one: _Running) -> int:
        if one.sent < len(one.tokens):
            return one.tokens[one.sent]
        if one.settings.stops:
            return one.settings.stops[0]
        return one.tokens[one.sent % len(one.tokens)] if one.tokens else 0

    def _choice(self, token: int, logprobs: int | None) -> Choice:
        """A token with made-up log-probabilities: -1 its own, then others."""
        if logprobs is None:
            return Choice(token)
        others = [(token + i) % self.vocab_size for i in range(logprobs)]
        return Choice(token, -1.0, tuple((i, -1.0 - n) for n, i in enumerate(others)))

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self._live or self._over):
                    self._lock.wait()
                if self._over:
                    return
            self.step()
            if self.pause:
                time.sleep(self.pause)
