"""What a server serves: an engine, a tokenizer, names of models, defaults and limits."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_jax.chat import ChatFormat
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.engine.settings import Generator
from qwen_jax.serve.grammars import Grammars
from qwen_jax.serve.metrics import Metrics
from qwen_jax.serve.refusals import Refusal

if TYPE_CHECKING:
    from qwen_jax.serve.jobs import Desk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes from one request, and from all of them.

    body: bytes of a request.
    depth: objects and lists inside each other in its JSON.
    body_seconds: the longest time that a client may take to send it.
    queue: sequences that wait for a row, beyond which requests are told to come back.
    n: sequences of a request: its prompts times `n`.
    prompt: tokens of a prompt; None for as many as the engine takes.
    stops: stop texts of a request.
    stop_size: characters of one of them.
    grammar: characters of a JSON schema, regular expression or grammar.
    grammar_seconds: the longest time to compile it.
    unread: new tokens of each sequence that wait for a client that does not read its stream, before
        it is given up.
    send_seconds: the longest time that a client may take to read a piece of a stream.
    ping_seconds: the time between comments that keep a stream's connection alive.
    """

    body: int = 8 * 2**20
    depth: int = 64
    body_seconds: float = 60
    queue: int = 256
    n: int = 128
    prompt: int | None = None
    stops: int = 16
    stop_size: int = 256
    grammar: int = 100_000
    grammar_seconds: float = 10
    unread: int = 8192
    send_seconds: float = 60
    ping_seconds: float = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds for a request that does not say it, from the model's generation_config.

    temperature, top_k, top_p, repetition_penalty: of sampling; temperature 0 for greedy.
    max_new_tokens: the most new tokens of a chat reply, fewer where fewer fit.
    chat_stops, text_stops: the ids that end a chat reply, and a completion.
    stop_texts: texts that end a completion.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    chat_stops: Sequence[int] = ()
    text_stops: Sequence[int] = ()
    stop_texts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Name:
    """A name by which requests choose what answers them.

    adapter: the engine's name of the adapter; None for the base model.
    """

    name: str
    adapter: str | None = None


@dataclasses.dataclass(kw_only=True)
class Served:
    """What all routes of a server share.

    vocab_size: the rows of the model's embedding; one more than the largest id that it takes.
    names: the first one is taken by a request without `model`.
    draining: whether new requests are refused, as the server is about to end.
    live: the number of sequences that are not over.
    answering: the number of requests that are being answered, but for those that only look.
    desk: hands requests to the engine; None before the application has started.
    """

    generator: Generator
    tokenizer: Tokenizer
    chat_format: ChatFormat
    vocab_size: int
    names: Sequence[Name]
    defaults: Defaults
    limits: Limits
    grammars: Grammars
    metrics: Metrics
    started: int
    draining: bool = False
    live: int = 0
    answering: int = 0
    desk: "Desk | None" = None

    def named(self, name: str | None) -> Name:
        """Return the served name, or raise Refusal 404."""
        if name is None:
            return self.names[0]
        for one in self.names:
            if one.name == name:
                return one
        known = ", ".join(one.name for one in self.names)
        what = f"model: {name!r} is not served; there are {known}"
        raise Refusal(404, what, param="model", code="model_not_found")

    @property
    def longest(self) -> int:
        """The most tokens of a request, prompt and new ones together."""
        return self.generator.longest
