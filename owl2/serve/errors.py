"""Everything that can go wrong with a request, in OpenAI's shape: `{"error": {...}}`.

::

    routes, images, engine ──ApiError, InputError, …──► as_api_error ──► status and ErrorReply

What a client can cause is a 4xx, what the server is too small for a 429 or 503. Anything else is a
code of ours: it is logged whole, and the client learns no more than that.

The shape is that of https://platform.openai.com/docs/guides/error-codes: clients choose their class
of exception by the status.
"""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from itertools import groupby
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from owl2.errors import ErrorCode, InputError

logger = logging.getLogger(__name__)

SHOWN = 200  # characters of a value that an error repeats, at most
LONGEST = 1000  # characters of a message: what others wrote of an error may repeat more


class ErrorDetail(BaseModel):
    """What was wrong.

    Attributes:
        message: for a person: what, where, and what to do.
        type: the family, by the status.
        param: the field of the request, as `messages.0.content`.
        code: for a program.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every reply whose status is 400 or above."""

    error: ErrorDetail


class ApiError(Exception):
    """A request ends with this status; raised by whatever finds out."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's name of the family."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`: the reply, or an event of a stream that has begun."""
        detail = ErrorDetail(
            message=_plain(_shortened(self.message, LONGEST)),
            type=self.type,
            param=None if self.param is None else _plain(self.param),
            code=self.code,
        )
        return ErrorReply(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """The whole reply."""
        return JSONResponse(self.body(), self.status, self.headers)


# ------------------------------------------------------------------ the server is too small


def too_busy(waiting: int, seconds: int = 1) -> ApiError:
    """As many wait as may. `seconds`: after which to ask again."""
    return ApiError(
        429,
        f"The server is busy: {waiting} requests wait already. Ask again in a moment.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def too_slow(seconds: float) -> ApiError:
    """A request was not finished in its time."""
    return ApiError(
        503,
        f"The request was not finished within {seconds:g} seconds and was given up. Ask for fewer "
        "tokens, or when the server is less busy.",
        code="timeout",
    )


def closing() -> ApiError:
    """The server ends."""
    return ApiError(
        503,
        "The server is shutting down and takes no new requests. Ask again, or another server.",
        code="shutting_down",
        headers={"Retry-After": "10"},
    )


# ------------------------------------------------------------------ any exception → ApiError


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception. What is our own code is logged here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        code = "context_length_exceeded" if error.code == ErrorCode.TOO_LONG else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, HTTPException):
        return _of_http(error)
    logger.error("A request failed.", exc_info=error)
    return ApiError(500, "Something went wrong in the server; its log says what.")


def add_handlers(app: FastAPI) -> None:
    """Make every error of `app` an `ErrorReply`."""

    async def reply(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, InputError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, reply)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: these statuses, each with an `ErrorReply`."""
    return {
        status: {"model": ErrorReply, "description": HTTPStatus(status).phrase}
        for status in statuses
    }


def _of_http(error: HTTPException) -> ApiError:
    """Starlette's own: an unknown path, a wrong method, a body that is no JSON."""
    # 400: FastAPI's word on a body that is no UTF-8, too deep, or has a number of no end.
    codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        error.status_code,
        str(error.detail),
        code=codes.get(error.status_code),
        headers=error.headers,
    )


def _of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first problem of a body that does not fit; OpenAI's servers say 400, not 422."""
    first = problems[0]
    # Of a kind of part, pydantic names the kind before the field of that name.
    places = [str(place) for place, _ in groupby(first["loc"])]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"The body is no JSON: {reason}.", code="invalid_json")
    if places == ["body"] and first["type"] != "value_error":
        message = "Send a JSON object, with the header 'Content-Type: application/json'."
        return ApiError(400, message, code="invalid_json")
    param = ".".join(places[1:]) or None
    where = f"'{param}'" if param else "The body"
    message = f"{where}: {_lower(str(first['msg']).removeprefix('Value error, '))}"
    given = first.get("input")
    if isinstance(given, (bool, int, float, str)) and given != "":
        message += f" (it is {_shown(given)})"
    if len(problems) > 1:
        message += f"; {len(problems) - 1} more of the kind"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{message}.", code=code, param=param)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shown(value: object) -> str:
    # Python writes no integers of more than some thousand digits.
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a huge number"
    return _shortened(repr(value), SHOWN)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _plain(text: str) -> str:
    """Without halves of characters, which cannot be sent."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
