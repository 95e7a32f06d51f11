"""Errors as answers, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

FastAPI's own shape, "detail", is shown badly by OpenAI's clients, so no answer has it.
"""

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qwen_jax.runtime import texts

_LOG = logging.getLogger(__name__)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class Refusal(HTTPException):
    """An error that ends a request with a status and a message for its sender.

    param: the field of the request that is wrong; None for none in particular.
    code: a name for programs; None takes the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = texts.brief(texts.printable(message)), param, code

    def body(self) -> dict[str, Any]:
        """Return the object that tells the error."""
        kind = _TYPES.get(self.status_code, "server_error")
        code: str | int = self.code if self.code is not None else self.status_code
        shown = {"message": self.message, "type": kind, "param": self.param, "code": code}
        return {"error": shown}

    def response(self) -> JSONResponse:
        """Return the answer that tells the error."""
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def invalid(param: str, message: str, *, code: str | None = None) -> Refusal:
    """Return the error 400 for a field of a request; the message begins with the field's name."""
    return Refusal(400, f"{param}: {message}", param=param, code=code)


def busy(status: int, message: str, *, seconds: int) -> Refusal:
    """Return an error after which the client should try again, in so many seconds."""
    return Refusal(status, message, headers={"retry-after": str(seconds)})


def mistake(error: Exception) -> Refusal:
    """Return the error for a mistake of the server itself, and log its traceback."""
    _LOG.error("an answer failed:\n%s", "".join(traceback.format_exception(error)))
    return Refusal(500, "the server made an error, which is in its log")


def install(app: FastAPI) -> None:
    """Have an application tell all errors in OpenAI's shape."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, Refusal):
            assert isinstance(error, HTTPException)
            error = Refusal(error.status_code, str(error.detail), headers=error.headers)
        return error.response()

    async def not_valid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return explained(error.errors(), error.body).response()

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return mistake(error).response()

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(Exception, failed)


def explained(problems: Sequence[Mapping[str, Any]], body: object) -> Refusal:
    """Return the error for what pydantic has found wrong with a request, of which it tells one.

    problems: as pydantic lists them.
    body: the request.
    """
    if isinstance(body, bytes | bytearray) or body is None:
        return Refusal(400, "a JSON object is needed, with Content-Type: application/json")
    # Of the members of a union, those that fit best fail at the deepest place.
    depth = max(len(_place(problem, body)) for problem in problems)
    found = [problem for problem in problems if len(_place(problem, body)) == depth]
    param = named(_place(found[0], body))
    here = [problem for problem in found if named(_place(problem, body)) == param]
    said = dict.fromkeys(str(problem["msg"]).removeprefix("Value error, ") for problem in here)
    message = ", or: ".join(said)
    if found[0]["type"] == "missing":
        return Refusal(400, f"{param} is missing", param=param)
    return invalid(param, message) if param else Refusal(400, f"the body: {message}")


def _place(problem: Mapping[str, Any], body: object) -> list[int | str]:
    """Return a problem's place in the request, without what pydantic adds, as names of types."""
    where, found = problem["loc"][1:], []
    for part in where:
        if isinstance(body, Mapping) and part in body:
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part] if part < len(body) else None
        else:
            continue
        found.append(part)
    return [*found, where[-1]] if problem["type"] == "missing" else found


def named(place: Sequence[int | str]) -> str:
    """Format a place in a request as OpenAI does: messages[0].content."""
    parts = [f"[{x}]" if isinstance(x, int) else f".{texts.printable(x)}" for x in place]
    return texts.brief("".join(parts).removeprefix("."))
