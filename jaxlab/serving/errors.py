"""Every error as the OpenAI protocol has it: one JSON object that says why, never a traceback."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from jaxlab.errors import BankError, ConfigError, DataError, JaxlabError, RewrittenError

log = logging.getLogger(__name__)

REWRITTEN = "the bank was rewritten (compacted or repaired): start the server again"
CHANGED = "the bank was changed meanwhile: try again"
BANK_FAILED = "the bank could not be read or written; the server's log says why"
TOO_MANY = "too many requests are waiting: try again later"
FAILED = "the server failed; its log says why"
# The type of what pydantic says of a field that has a value of no effect here.
UNSUPPORTED = "unsupported"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(BaseModel):
    """What went wrong: which parameter, if one, and a short code for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is an error."""

    error: Problem


class ApiError(Exception):
    """An error with the status of its answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: JaxlabError) -> "ApiError":
        """What of an error its client is told; where it is the server's fault, the log the rest."""
        if isinstance(error, DataError | ConfigError):
            return cls(400, str(error))
        # It may name paths of this machine, which are not for clients.
        log.error("a request failed: %s", error)
        if isinstance(error, RewrittenError):
            return cls(503, CHANGED)
        return cls(500, BANK_FAILED if isinstance(error, BankError) else FAILED)

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        problem = Problem(message=self.message, type=kind, param=self.param, code=self.code)
        return Failure(error=problem).model_dump()

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


def handle_errors(app: FastAPI, told: Callable[[JaxlabError], Awaitable[ApiError]]) -> None:
    """Let ``app`` answer every error in this form; ``told`` says what is told of one of ours."""

    @app.exception_handler(ApiError)
    async def of_api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(JaxlabError)
    async def of_jaxlab(_: Request, error: JaxlabError) -> JSONResponse:
        return (await told(error)).response()

    @app.exception_handler(RequestValidationError)
    async def of_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = _closest(error.errors())
        # A loc names fields, places in lists, and which of several types was tried.
        parts = [str(part) for part in first["loc"][1:]]
        place = ".".join(p for p in parts if p.isidentifier() or p.isdigit()) or None
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON").response()
        if first["type"] == UNSUPPORTED:
            place = ".".join(filter(None, (place, first["ctx"]["field"])))
            return ApiError(400, f"{place} {first['msg']}", param=place).response()
        reason = first["msg"].removeprefix("Value error, ")
        # What was given may be anything; it is not repeated.
        return ApiError(400, f"{place or 'the body'}: {reason}", param=place).response()

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException) -> JSONResponse:
        messages = {404: "there is nothing here", 405: f"not by {request.method}"}
        message = messages.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def of_server(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return ApiError(500, FAILED).response()


def _closest(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The error to tell: where a field may be of several types, of the type that was meant."""
    place = errors[0]["loc"][:2]
    same = [error for error in errors if error["loc"][:2] == place]
    return next((error for error in same if not error["type"].endswith("_type")), errors[0])


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": description}
    for status, description in {
        400: "The request is wrong.",
        401: "The key is missing or wrong.",
        403: "The server was started without a key.",
        404: "No such model.",
        413: "The body is too long.",
        415: "The body is no JSON.",
        421: "The server has another name.",
        429: "Too many requests are waiting.",
        500: "The server failed.",
        503: "The server is going down, or its bank was changed or rewritten.",
        504: "The answer took too long.",
    }.items()
}
