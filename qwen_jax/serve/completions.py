"""POST /v1/completions: texts that continue prompts, given as texts or token ids."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from qwen_jax.chat.tokenizer import TextStream
from qwen_jax.engine.settings import Choice
from qwen_jax.serve import request_settings
from qwen_jax.serve.connection import EventStream, event, unless_gone
from qwen_jax.serve.drafts import Draft, Piece, Token
from qwen_jax.serve.exchange import Exchange, encode, finite
from qwen_jax.serve.jobs import Desk
from qwen_jax.serve.protocol import CompletionRequest
from qwen_jax.serve.refusals import invalid
from qwen_jax.serve.served import Served

_KIND = "text_completion"


async def answer(request: Request, body: CompletionRequest, desk: Desk) -> Response:
    """Answer a request for completions."""
    if body.stream:
        exchange = await _begin(body, desk)
        close, limits = exchange.group.close, desk.served.limits
        return EventStream(_events(exchange, body), close=close, limits=limits)
    return await unless_gone(request, _whole(body, desk))


async def _begin(body: CompletionRequest, desk: Desk) -> Exchange:
    """Submit what a request asks for. Raises Refusal."""
    served = desk.served
    request_settings.check(body, served)
    if body.best_of is not None and body.best_of != request_settings.count(body):
        raise invalid("best_of", "is not supported, but as n")
    name = served.named(body.model)
    source = request_settings.grammar_of(body)
    given = await _prompts(body, served)
    prompts = []
    scored = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        scored = max(scored or 0, body.logprobs)
    for ids in given:
        count = request_settings.count(body)
        grammar = source and await served.grammars.compile(source, count=count)
        each = request_settings.settings(
            body,
            served,
            room=served.longest - len(ids),
            asked=1 if _hides_new(body) else body.max_tokens,
            default=16,
            own_stops=served.defaults.text_stops,
            adapter=name.adapter,
            grammar=grammar,
            logprobs=body.logprobs,
            prompt_logprobs=scored,
        )
        prompts.append((ids, each))
    drafts = [_draft(body, served, each.stops) for _, many in prompts for each in many]
    return Exchange(desk, body, kind=_KIND, model=name.name, prompts=prompts, drafts=drafts)


def _hides_new(body: CompletionRequest) -> bool:
    """Whether only the prompt is wanted, with its log-probabilities. (A token is generated.)"""
    return bool(body.echo) and body.max_tokens == 0


def _draft(body: CompletionRequest, served: Served, stop_ids: Sequence[int]) -> Draft:
    return Draft(
        served.tokenizer,
        stop_ids=stop_ids,
        own_ids=(*served.defaults.text_stops, *served.grammars.ends),
        stops=[*request_settings.stops(body), *served.defaults.stop_texts],
        least=body.min_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
        with_stop=bool(body.include_stop_str_in_output),
        all_tokens=True,
    )


async def _prompts(body: CompletionRequest, served: Served) -> list[list[int]]:
    """Return the ids of each prompt. Raises Refusal."""
    given: Any = body.prompt
    listed = isinstance(given, list) and not (given and isinstance(given[0], int))
    each = given if listed else [given]
    if not each:
        raise invalid("prompt", "is empty")
    if len(each) * request_settings.count(body) > served.limits.n:
        what = f"{len(each)} prompts times n: at most {served.limits.n} sequences"
        raise invalid("prompt", what)
    found = []
    for number, one in enumerate(each):
        param = f"prompt[{number}]" if listed else "prompt"
        ids = await encode(served, one) if isinstance(one, str) else list(one)
        found.append(fitting(body, served, ids, param=param))
    return found


def fitting(body: Any, served: Served, ids: list[int], *, param: str) -> list[int]:
    """Return a prompt's ids, cut where the request asks for it. Raises Refusal.

    param: the field that has the prompt.
    """
    if not ids:
        raise invalid(param, "has no tokens")
    if max(ids) >= served.vocab_size:
        what = f"token id {max(ids)} is out of range: from 0 to {served.vocab_size - 1}"
        raise invalid(param, what)
    most = served.longest - 1
    if served.limits.prompt is not None:
        most = min(most, served.limits.prompt)
    if (cut := body.truncate_prompt_tokens) is not None:
        if cut == 0:
            raise invalid("truncate_prompt_tokens", "must be -1 or at least 1")
        ids = ids[-(most if cut == -1 else cut) :]
    if len(ids) > most:
        what = f"{len(ids)} tokens: at most {most}"
        raise invalid(param, what, code="context_length_exceeded")
    return ids


async def _whole(body: CompletionRequest, desk: Desk) -> Response:
    exchange = await _begin(body, desk)
    parts = [_Parts(exchange, body, index) for index in range(len(exchange.drafts))]
    try:
        async for index, piece in exchange.pieces():
            parts[index].add(piece)
    finally:
        exchange.group.close()
    return JSONResponse(exchange.answer([part.choice() for part in parts]))


async def _events(exchange: Exchange, body: CompletionRequest) -> AsyncIterator[bytes]:
    parts = [_Parts(exchange, body, index) for index in range(len(exchange.drafts))]
    async for index, piece in exchange.pieces():
        part, draft = parts[index], exchange.drafts[index]
        part.add(piece)
        if part.text or part.tokens or (body.return_token_ids and piece.ids):
            yield event(exchange.chunk(part.take(), kind=_KIND))
        if draft.reason is not None:
            yield event(exchange.chunk(part.choice(last=True), kind=_KIND))
    if (last := exchange.last_chunk(kind=_KIND)) is not None:
        yield event(last)


class _Parts:
    """What is known of a choice and has not been told yet: all of it, or a part for a stream."""

    def __init__(self, exchange: Exchange, body: CompletionRequest, index: int):
        self._exchange, self._body, self._index = exchange, body, index
        self._draft = exchange.drafts[index]
        self._prompt = exchange.group.jobs[index].prompt
        self._begun, self._shift = False, 0
        self.text, self.tokens, self._ids = "", list[Token](), list[int]()

    def add(self, piece: Piece) -> None:
        """Add what came of the sequence."""
        if not self._begun and (piece.ids or self._draft.reason is not None):
            self._begun = True
            if self._body.echo:
                self._echo()
        if not _hides_new(self._body):
            self.text += piece.text
            self._ids += piece.ids
            self.tokens += [Token(x.choice, x.start + self._shift) for x in piece.tokens]

    def _echo(self) -> None:
        """Begin with the prompt, whose first token has no log-probability."""
        tokenizer, scores = self._exchange.served.tokenizer, self._draft.scores
        skip = self._body.skip_special_tokens is not False
        start = len(self._prompt) - len(scores)
        stream, at = TextStream(tokenizer, skip_special_tokens=skip), 0
        for choice in (*(Choice(i) for i in self._prompt[:start]), *scores):
            self.tokens.append(Token(choice, at))
            at += len(stream.push((choice.id,)))
        self.text = tokenizer.decode(self._prompt, skip_special_tokens=skip)
        self._shift = len(self.text)

    def take(self) -> dict[str, Any]:
        """Return what is new for a stream, and forget it."""
        found = {**self.choice(), "finish_reason": None, "stop_reason": None}
        self.text, self.tokens, self._ids = "", [], []
        return found

    def choice(self, *, last: bool = False) -> dict[str, Any]:
        """Return the choice, or the last chunk of its stream."""
        exchange, body = self._exchange, self._body
        found = {
            "index": self._index,
            "text": self.text,
            "logprobs": None if last or body.logprobs is None else self._logprobs(body.logprobs),
            "finish_reason": "length" if _hides_new(body) else self._draft.reason,
            "stop_reason": self._draft.stop,
            **exchange.ids_told(self._ids),
        }
        if not body.stream and body.return_token_ids:
            found["prompt_token_ids"] = list(self._prompt)
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = exchange.prompt_logprobs(self._prompt, self._draft.scores)
        return found

    def _logprobs(self, count: int) -> dict[str, Any]:
        """Return log-probabilities as legacy completions tell them."""
        text = self._exchange.token_text
        top = []
        for token in self.tokens:
            choice = token.choice
            each = {text(i, marked=True): finite(x) for i, x in choice.top[:count]}
            each.setdefault(text(choice.id, marked=True), finite(choice.logprob))
            top.append(None if choice.logprob is None else each)
        return {
            "tokens": [text(token.choice.id, marked=True) for token in self.tokens],
            "token_logprobs": [finite(token.choice.logprob) for token in self.tokens],
            "top_logprobs": top,
            "text_offset": [token.start for token in self.tokens],
        }
