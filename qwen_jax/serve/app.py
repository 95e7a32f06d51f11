"""The ASGI application: its routes, and what they share."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.types import ASGIApp

from qwen_jax.chat import ChatFormat, ChatML
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.engine.settings import Generator
from qwen_jax.runtime.version import VERSION
from qwen_jax.serve import chats, completions, refusals, strict_json, tokenization
from qwen_jax.serve.gate import Gate
from qwen_jax.serve.grammars import Grammars
from qwen_jax.serve.jobs import Desk
from qwen_jax.serve.metrics import CONTENT_TYPE, Metrics
from qwen_jax.serve.pages import Pages
from qwen_jax.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from qwen_jax.serve.refusals import Refusal, busy
from qwen_jax.serve.served import Defaults, Limits, Name, Served

PAGE = Path(__file__).parent / "page"
_LARGE = 2**17  # bytes of JSON that are read beside the event loop


def application(
    generator: Generator,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    names: Sequence[Name],
    defaults: Defaults,
    chat_format: ChatFormat | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    page: Path = PAGE,
) -> tuple[ASGIApp, Served]:
    """Return the application, and what its routes share.

    generator: the engine.
    vocab_size: one more than the largest id that the model takes.
    names: of the model, and of its adapters.
    chat_format: of the model; None for ChatML with tools as in ReAct.
    keys: API keys, one of which each request needs; none for a server that anybody may use.
    hosts: the names that the header Host may have; None for any.
    page: the folder of static files for `/`.
    """
    limits = limits or Limits()
    served = Served(
        generator=generator,
        tokenizer=tokenizer,
        chat_format=chat_format or ChatML(tokenizer),
        vocab_size=vocab_size,
        names=names,
        defaults=defaults,
        limits=limits,
        grammars=Grammars(
            tokenizer,
            vocab_size=vocab_size,
            ends=(tokenizer.im_end_id, tokenizer.eod_id),
            size=limits.grammar,
            seconds=limits.grammar_seconds,
        ),
        metrics=Metrics(generator, names[0].name),
        started=int(time.time()),
    )
    app = FastAPI(
        title="qwen_jax",
        version=VERSION,
        description="Qwen models by OpenAI's API.",
        docs_url=None,  # it loads scripts of another site
        redoc_url=None,
        lifespan=_lifespan(served),
    )
    app.router.route_class = _route_class(limits.depth)
    refusals.install(app)
    _add_api(app, served)
    _add_state(app, served)
    _describe(app)
    pages = Pages(page)
    app.router.routes += [Route(path, pages, methods=["GET"]) for path in pages.paths]
    open_paths = ("/health", *pages.paths)
    return Gate(app, served=served, keys=keys, hosts=hosts, open_paths=open_paths), served


def _lifespan(served: Served) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.grammars.prepare()
        served.desk = Desk(served, asyncio.get_running_loop())
        watch = asyncio.create_task(served.desk.watch())
        yield
        watch.cancel()
        served.grammars.close()

    return lifespan


def _route_class(depth: int) -> type[APIRoute]:
    """Return the class of routes whose JSON bodies are read strictly."""

    class StrictRequest(Request):
        async def json(self) -> Any:
            if not hasattr(self, "_json"):
                data = await self.body()
                if len(data) < _LARGE:
                    self._json = strict_json.read(data, depth=depth)
                else:
                    self._json = await asyncio.to_thread(strict_json.read, data, depth=depth)
            return self._json

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore
            handle = super().get_route_handler()

            async def strict(request: Request) -> Response:
                return await handle(StrictRequest(request.scope, request.receive))

            return strict

    return StrictRoute


def _describe(app: FastAPI) -> None:
    """Leave the errors out of the description of the API that FastAPI has, and we do not."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            told = made()
            for operations in told["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                told["components"]["schemas"].pop(name, None)
        return made()

    app.openapi = openapi


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of errors that a route answers with."""
    told = {"application/json": {"schema": _ERROR}}
    return {status: {"description": "an error", "content": told} for status in statuses}


def _add_api(app: FastAPI, served: Served) -> None:
    """Add the routes that read a request's body."""

    def desk() -> Desk:
        assert served.desk is not None, "the application has started"
        return served.desk

    stream: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    generating = _errors(400, 401, 403, 404, 408, 413, 429, 500, 503)
    generating[200] = {"description": "an answer, or a stream of events", "content": stream}

    @app.post("/v1/chat/completions", responses=generating, tags=["OpenAI"])
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await chats.answer(request, body, desk())

    @app.post("/v1/completions", responses=generating, tags=["OpenAI"])
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continue texts."""
        return await completions.answer(request, body, desk())

    reading = _errors(400, 401, 403, 404, 408, 413, 503)

    @app.post("/tokenize", responses=reading, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the token ids of a text, or of the prompt of a conversation."""
        return JSONResponse(await tokenization.tokenize(body, served))

    @app.post("/detokenize", responses=reading, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of token ids."""
        return JSONResponse(await tokenization.detokenize(body, served))


def _add_state(app: FastAPI, served: Served) -> None:
    """Add the routes that tell what the server is and does."""

    def model(name: Name) -> dict[str, Any]:
        base = served.names[0].name
        return {
            "id": name.name,
            "object": "model",
            "created": served.started,
            "owned_by": "qwen_jax",
            "root": name.name if name.adapter is None else name.adapter,
            "parent": None if name.adapter is None else base,
            "max_model_len": served.longest,
            "permission": [],
        }

    @app.get("/v1/models", responses=_errors(401, 403), tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """Return the names that are served."""
        return {"object": "list", "data": [model(name) for name in served.names]}

    @app.get("/v1/models/{name:path}", responses=_errors(401, 403, 404), tags=["OpenAI"])
    async def one_model(name: str) -> dict[str, Any]:
        """Return one of the names that are served."""
        return model(served.named(name))

    @app.get("/health", responses=_errors(403, 503), tags=["state"], response_class=Response)
    async def health() -> Response:
        """Return 200 with an empty body if requests are taken, else 503."""
        if (failure := served.generator.failure) is not None:
            raise Refusal(503, f"the engine has stopped: {failure}")
        if served.draining:
            raise busy(503, "the server is about to end", seconds=5)
        return Response()

    figures = {200: {"description": "figures", "content": {CONTENT_TYPE: {}}}}

    @app.get(
        "/metrics",
        responses={**_errors(401, 403), **figures},
        tags=["state"],
        response_class=Response,
    )
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/version", responses=_errors(401, 403), tags=["state"])
    async def version() -> dict[str, str]:
        """Return the version of qwen_jax."""
        return {"version": VERSION}

    @app.get("/load", responses=_errors(401, 403), tags=["state"])
    async def load() -> dict[str, int]:
        """Return the number of sequences that are not over."""
        return {"server_load": served.live}
