"""POST /v1/chat/completions: replies to conversations, with tools."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from qwen_jax.chat import (
    CallBegins,
    MessageError,
    Prompt,
    ReplyEnds,
    ReplyEvent,
    TextDelta,
)
from qwen_jax.serve import request_settings
from qwen_jax.serve.completions import fitting
from qwen_jax.serve.connection import EventStream, event, unless_gone
from qwen_jax.serve.drafts import Draft, Piece, Token
from qwen_jax.serve.exchange import Exchange
from qwen_jax.serve.jobs import Desk
from qwen_jax.serve.protocol import ChatRequest, TokenizeRequest
from qwen_jax.serve.refusals import invalid
from qwen_jax.serve.served import Served
from qwen_jax.serve.tool_choice import Tools, refused, tools_of

_KIND, _CHUNK = "chat.completion", "chat.completion.chunk"
_LONG = 4096  # characters of messages and tools that are encoded beside the event loop
_EACH = 40  # characters that take as long as the rest of a message
_LEAST = 4  # tokens of an empty message


async def prompt(body: ChatRequest | TokenizeRequest, served: Served, *, tools: Tools) -> Prompt:
    """Return the prompt of a conversation. No turn of it is left out. Raises Refusal."""
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid("continue_final_message", "not with add_generation_prompt: true")
    given = body.messages or []
    if _LEAST * len(given) > served.longest:
        what = f"{len(given)} messages are more than {served.longest} tokens, as the model takes"
        raise invalid("messages", what, code="context_length_exceeded")
    messages = [message.given() for message in given]

    def made() -> Prompt:
        return served.chat_format.prompt(
            messages,
            tools=tools.described,
            stop=request_settings.stops(body) if isinstance(body, ChatRequest) else (),
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
        )

    try:
        size = sum(_EACH + len(str(message)) for message in [*messages, *tools.described])
        if size < _LONG:
            return made()
        return await asyncio.to_thread(made)
    except MessageError as error:
        raise refused(error, tools) from None


async def answer(request: Request, body: ChatRequest, desk: Desk) -> Response:
    """Answer a request for chat completions."""
    if body.stream:
        chat = await _begin(body, desk)
        close, limits = chat.exchange.group.close, desk.served.limits
        return EventStream(chat.events(), close=close, limits=limits)
    return await unless_gone(request, _whole(body, desk))


async def _begin(body: ChatRequest, desk: Desk) -> "Chat":
    """Submit what a request asks for. Raises Refusal."""
    served = desk.served
    request_settings.check(body, served)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "only with logprobs: true")
    name = served.named(body.model)
    tools = tools_of(body)
    source = request_settings.grammar_of(body)
    held = tools.grammar(served.chat_format)
    if source is not None and tools.described:
        raise invalid(source.param, "not with tools, whose calls are text of another form")
    found = await prompt(body, served, tools=tools)
    ids = fitting(body, served, found.ids, param="messages")
    count = request_settings.count(body)
    source = source or held
    grammar = source and await served.grammars.compile(source, count=count)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    own = (*served.defaults.chat_stops, *found.end_ids)
    each = request_settings.settings(
        body,
        served,
        room=served.longest - len(ids),
        asked=asked,
        default=served.defaults.max_new_tokens,
        own_stops=own,
        adapter=name.adapter,
        grammar=grammar,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    drafts = [
        Draft(
            served.tokenizer,
            stop_ids=settings.stops,
            own_ids=(*own, *served.grammars.ends),
            stops=found.asked,
            least=body.min_tokens or 0,
            skip_special_tokens=body.skip_special_tokens is not False,
            with_stop=bool(body.include_stop_str_in_output),
        )
        for settings in each
    ]
    exchange = Exchange(
        desk, body, kind=_KIND, model=name.name, prompts=[(ids, each)], drafts=drafts
    )
    try:
        return Chat(exchange, body, found, older=tools.older)
    except BaseException:  # what was submitted must not run on for nobody
        exchange.group.close()
        raise


async def _whole(body: ChatRequest, desk: Desk) -> Response:
    chat = await _begin(body, desk)
    try:
        return JSONResponse(await chat.whole())
    finally:
        chat.exchange.group.close()


class Chat:
    """A chat request whose replies are being generated.

    prompt: what the model was given.
    older: whether calls are told as the older `function_call`.
    """

    def __init__(self, exchange: Exchange, body: ChatRequest, prompt: Prompt, *, older: bool):
        self.exchange, self._body, self._prompt, self._older = exchange, body, prompt, older
        form = exchange.served.chat_format
        self._form, self._echo = form, self._echoed()
        self._parsers = [form.parser(prompt.begins) for _ in exchange.drafts]
        self._ids = [f"call_{uuid.uuid4().hex[:24]}" for _ in exchange.drafts]

    def _echoed(self) -> str:
        """Return the text that the model continues, if the request wants to see it."""
        last = self._body.messages[-1]
        continued = self._prompt.mode == "completion" and last.role == "assistant"
        plain = self._prompt.begins == "plain" and isinstance(last.content, str)
        return str(last.content) if self._body.echo and continued and plain else ""

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece, list[ReplyEvent]]]:
        """Yield what comes of each reply, as text and as events, until all have ended."""
        async for index, piece in self.exchange.pieces():
            parser, draft = self._parsers[index], self.exchange.drafts[index]
            events = [] if parser.over else parser.push(piece.text)
            if parser.over:
                self.exchange.end(index)
            elif draft.reason is not None:
                events += parser.flush()
            yield index, piece, events

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        exchange, body = self.exchange, self._body
        pieces = [Piece() for _ in exchange.drafts]
        async for index, new, _ in self._pieces():
            pieces[index].text += new.text
            pieces[index].tokens += new.tokens
        more: dict[str, Any] = {}
        ids = exchange.prompts[0][0]
        if body.return_token_ids:
            more["prompt_token_ids"] = list(ids)
        if body.prompt_logprobs is not None:
            more["prompt_logprobs"] = exchange.prompt_logprobs(ids, exchange.drafts[0].scores)
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return exchange.answer(choices, **more)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice of the whole answer."""
        draft = self.exchange.drafts[index]
        reply = self._form.parse(piece.text, self._prompt.begins)
        content = None if reply.content is None else self._echo + reply.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        calls = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
        if calls and self._older:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": self._ids[index], "type": "function", "function": call} for call in calls
            ]
        told = self._body.logprobs
        return {
            "index": index,
            "message": message,
            "logprobs": self.exchange.chat_logprobs(piece.tokens) if told else None,
            "finish_reason": self._reason(draft, calls=bool(calls)),
            "stop_reason": draft.stop,
            **self.exchange.ids_told(draft.ids),
        }

    def _reason(self, draft: Draft, *, calls: bool) -> str | None:
        """Return how a reply has ended. A call that was cut off is none that can be made."""
        if not calls or draft.reason == "length":
            return draft.reason
        return "function_call" if self._older else "tool_calls"

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of a stream: for each choice its role, what it says, how it ended."""
        begun: set[int] = set()
        tokens: list[list[Token]] = [[] for _ in self.exchange.drafts]
        called: set[int] = set()
        async for index, piece, events in self._pieces():
            draft = self.exchange.drafts[index]
            # Not before the first token: clients take the time of the first chunk for the token's.
            if index not in begun and (piece.ids or draft.reason is not None):
                begun.add(index)
                yield self._chunk(index, {"role": "assistant", "content": self._echo})
            tokens[index] += piece.tokens
            more = self.exchange.ids_told(piece.ids)
            for one in events:
                if isinstance(one, CallBegins):
                    called.add(index)
                if (delta := self._delta(index, one)) is not None:
                    yield self._chunk(index, delta, tokens[index], **more)
                    tokens[index], more = [], {}
            if more.get("token_ids"):
                yield self._chunk(index, {"content": ""}, tokens[index], **more)
                tokens[index] = []
            if draft.reason is not None:
                reason = self._reason(draft, calls=index in called)
                ended = {"finish_reason": reason, "stop_reason": draft.stop}
                yield self._chunk(index, {}, tokens[index], **ended)
        if (last := self.exchange.last_chunk(kind=_CHUNK)) is not None:
            yield event(last)

    def _delta(self, index: int, one: ReplyEvent) -> dict[str, Any] | None:
        """Return an event of a reply as a delta; None for its end."""
        if isinstance(one, ReplyEnds):
            return None
        if isinstance(one, TextDelta):
            return {"content": one.text}
        if isinstance(one, CallBegins):
            call: dict[str, Any] = {"id": self._ids[index], "type": "function"}
            function = {"name": one.name, "arguments": ""}
        else:
            call, function = {}, {"arguments": one.text}
        if self._older:
            return {"function_call": function}
        return {"tool_calls": [{"index": one.index, **call, "function": function}]}

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: list[Token] | None = None, **more: Any
    ) -> bytes:
        """Return an event of the stream."""
        told = self.exchange.chat_logprobs(tokens) if self._body.logprobs and tokens else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": None}
        return event(self.exchange.chunk({**choice, **more}, kind=_CHUNK))
