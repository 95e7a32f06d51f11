"""POST /v1/chat/completions: replies to conversations."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from qwen_jax import chat
from qwen_jax.serve import request_settings
from qwen_jax.serve.completions import fitting
from qwen_jax.serve.connection import EventStream, event, unless_gone
from qwen_jax.serve.drafts import Draft, Piece
from qwen_jax.serve.exchange import Exchange
from qwen_jax.serve.jobs import Desk
from qwen_jax.serve.protocol import ChatRequest, TokenizeRequest
from qwen_jax.serve.refusals import Refusal, invalid
from qwen_jax.serve.served import Served

_KIND, _CHUNK = "chat.completion", "chat.completion.chunk"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt of a conversation.

    ids: its token ids.
    """

    ids: list[int]


async def prompt(body: ChatRequest | TokenizeRequest, served: Served) -> Prompt:
    """Return the prompt of a conversation. Raises Refusal."""
    messages = [message.given() for message in body.messages or ()]
    try:
        *past, last = messages
        system, pairs = chat.turns_of(past, chat.DEFAULT_SYSTEM)
        _, ids = chat.make_context(
            served.tokenizer, last["content"], pairs, system, served.defaults.window
        )
    except (ValueError, KeyError) as error:
        raise Refusal(400, str(error), param="messages") from None
    return Prompt(ids)


async def answer(request: Request, body: ChatRequest, desk: Desk) -> Response:
    """Answer a request for chat completions."""
    if body.stream:
        exchange = await _begin(body, desk)
        close, limits = exchange.group.close, desk.served.limits
        return EventStream(_events(exchange, body), close=close, limits=limits)
    return await unless_gone(request, _whole(body, desk))


async def _begin(body: ChatRequest, desk: Desk) -> Exchange:
    """Submit what a request asks for. Raises Refusal."""
    served = desk.served
    request_settings.check(body, served)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "only with logprobs: true")
    name = served.named(body.model)
    source = request_settings.grammar_of(body)
    found = await prompt(body, served)
    ids = fitting(body, served, found.ids, param="messages")
    count = request_settings.count(body)
    grammar = source and await served.grammars.compile(*source, count=count)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    each = request_settings.settings(
        body,
        served,
        room=served.longest - len(ids),
        asked=asked,
        default=served.defaults.max_new_tokens,
        own_stops=served.defaults.chat_stops,
        adapter=name.adapter,
        grammar=grammar,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    drafts = [
        Draft(
            served.tokenizer,
            stop_ids=settings.stops,
            own_ids=(*served.defaults.chat_stops, *served.grammars.ends),
            stops=request_settings.stops(body),
            least=body.min_tokens or 0,
            skip_special_tokens=body.skip_special_tokens is not False,
            with_stop=bool(body.include_stop_str_in_output),
        )
        for settings in each
    ]
    return Exchange(desk, body, kind=_KIND, model=name.name, prompts=[(ids, each)], drafts=drafts)


async def _whole(body: ChatRequest, desk: Desk) -> Response:
    exchange = await _begin(body, desk)
    pieces = [Piece() for _ in exchange.drafts]
    try:
        async for index, new in exchange.pieces():
            pieces[index].text += new.text
            pieces[index].tokens += new.tokens
    finally:
        exchange.group.close()
    choices = [_choice(exchange, body, index, pieces[index]) for index in range(len(pieces))]
    more: dict[str, Any] = {}
    ids = exchange.prompts[0][0]
    if body.return_token_ids:
        more["prompt_token_ids"] = list(ids)
    if body.prompt_logprobs is not None:
        more["prompt_logprobs"] = exchange.prompt_logprobs(ids, exchange.drafts[0].scores)
    return JSONResponse(exchange.answer(choices, **more))


def _choice(exchange: Exchange, body: ChatRequest, index: int, piece: Piece) -> dict[str, Any]:
    """Return a choice of a whole answer."""
    draft = exchange.drafts[index]
    return {
        "index": index,
        "message": {"role": "assistant", "content": piece.text, "refusal": None},
        "logprobs": exchange.chat_logprobs(piece.tokens) if body.logprobs else None,
        "finish_reason": draft.reason,
        "stop_reason": draft.stop,
        **exchange.ids_told(draft.ids),
    }


async def _events(exchange: Exchange, body: ChatRequest) -> AsyncIterator[bytes]:
    """Yield the events of a stream: for each choice its role, texts, and how it ended."""
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return event(exchange.chunk({**choice, **more}, kind=_CHUNK))

    async for index, piece in exchange.pieces():
        draft = exchange.drafts[index]
        if index not in begun and (piece.ids or draft.reason is not None):
            begun.add(index)
            yield chunk(index, {"role": "assistant", "content": ""})
        if piece.text or piece.tokens or (body.return_token_ids and piece.ids):
            more = exchange.ids_told(piece.ids)
            if body.logprobs and piece.tokens:
                more["logprobs"] = exchange.chat_logprobs(piece.tokens)
            yield chunk(index, {"content": piece.text}, **more)
        if draft.reason is not None:
            yield chunk(index, {}, finish_reason=draft.reason, stop_reason=draft.stop)
    if (last := exchange.last_chunk(kind=_CHUNK)) is not None:
        yield event(last)
