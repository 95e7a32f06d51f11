"""One request with its sequences, from prompts to pieces of text, for chats and completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from qwen_jax.engine.settings import Choice, Settings
from qwen_jax.runtime.version import VERSION
from qwen_jax.serve import grammars
from qwen_jax.serve.drafts import Draft, Piece, Token
from qwen_jax.serve.jobs import Desk, Group
from qwen_jax.serve.protocol import Common
from qwen_jax.serve.served import Served

FINGERPRINT = f"qwen_jax-{VERSION}"
_LOWEST = -9999.0  # JSON has no minus infinity
LONG = 4096  # characters or ids of a text that is encoded or decoded beside the event loop


async def encode(served: Served, text: str) -> list[int]:
    """Encode a text. A long one takes as long as many steps, so a thread does it."""
    if len(text) < LONG:
        return served.tokenizer.encode(text)
    return await asyncio.to_thread(served.tokenizer.encode, text)


class Exchange:
    """A request with its sequences.

    kind: the object of its answers: "chat.completion" or "text_completion".
    prompts: for each prompt its ids, and the settings of each of its sequences.
    drafts: the text of each sequence.
    """

    def __init__(
        self,
        desk: Desk,
        body: Common,
        *,
        kind: str,
        model: str,
        prompts: Sequence[tuple[Sequence[int], Sequence[Settings]]],
        drafts: Sequence[Draft],
    ):
        self.served, self.body = desk.served, body
        self.prompts, self.drafts = prompts, drafts
        self.group = Group(desk, prompts, bounded=bool(body.stream))
        short = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._head = {
            "id": f"{short}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self.group.start()
        for _, each in prompts:
            self.served.metrics.request(len(each))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield what comes of each sequence, with its number, until all have ended."""
        async for job, events in self.group.batches():
            draft = self.drafts[job.index]
            if draft.reason is not None:
                continue
            piece = draft.add(events)
            if draft.reason is not None:
                self.group.stop(job)
                if refusal := grammars.failed(job.settings.grammar):
                    raise refusal
            yield job.index, piece

    def end(self, index: int) -> None:
        """End a sequence, whose text is complete."""
        draft = self.drafts[index]
        draft.reason = draft.reason or "stop"
        self.group.stop(self.group.jobs[index])

    def answer(self, choices: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Return a whole answer.

        fields: those that it has beside `choices` and `usage`.
        """
        return {**self._head, "choices": list(choices), "usage": self.usage(), **fields}

    def chunk(self, choice: dict[str, Any], *, kind: str) -> dict[str, Any]:
        """Return a chunk of a stream, which is about one choice."""
        found = {**self._head, "object": kind, "choices": [choice]}
        options = self.body.stream_options
        if options is not None and options.include_usage:
            found["usage"] = self.usage() if options.continuous_usage_stats else None
        return found

    def last_chunk(self, *, kind: str) -> dict[str, Any] | None:
        """Return the chunk that has the usage and no choices, if the request wants it."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return None
        return {**self._head, "object": kind, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens so far."""
        prompt = sum(len(ids) for ids, _ in self.prompts)
        new = sum(len(draft.ids) for draft in self.drafts)
        cached = sum(job.cached or 0 for job in self.group.jobs if job.after is None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def ids_told(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return a choice's `token_ids`, if the request wants them."""
        return {"token_ids": list(ids)} if self.body.return_token_ids else {}

    def token_text(self, i: int, *, marked: bool) -> str:
        """Return the text of a token. One that is no whole text is written in escapes.

        marked: whether it begins with "bytes:" then, as in legacy completions.
        """
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{i}"
        data = self.served.tokenizer.id_to_bytes.get(i, b"\xff")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return ("bytes:" if marked else "") + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the log-probabilities of tokens as chats tell them."""

        def entry(i: int, logprob: float | None) -> dict[str, Any]:
            data = self.served.tokenizer.id_to_bytes.get(i, b"\xff")
            text = self.token_text(i, marked=False)
            return {"token": text, "logprob": finite(logprob), "bytes": list(data)}

        content = [
            {
                **entry(token.choice.id, token.choice.logprob),
                "top_logprobs": [entry(i, x) for i, x in token.choice.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def prompt_logprobs(self, ids: Sequence[int], scores: Sequence[Choice]) -> list[Any]:
        """Return vLLM's log-probabilities of a prompt: null, then candidates by id for each."""
        found: list[Any] = [None] * (len(ids) - len(scores))
        for choice in scores:
            ranks = {i: rank for rank, (i, _) in enumerate(choice.top, 1)}
            each = {**{choice.id: choice.logprob}, **dict(choice.top)}
            found.append(
                {
                    str(i): {
                        "logprob": finite(x),
                        "rank": ranks.get(i),
                        "decoded_token": self.token_text(i, marked=False),
                    }
                    for i, x in each.items()
                }
            )
        return found


def finite(logprob: float | None) -> float | None:
    """Return a log-probability as JSON can have it."""
    return None if logprob is None else max(logprob, _LOWEST)
