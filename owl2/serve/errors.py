"""Errors of the API in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

::

    routes, images, engine ──ApiError, InputError, ...──► as_api_error ──► status and ErrorResponse

Errors that a client can cause have a 4xx status, an overloaded server has 429 or 503. Everything
else is a bug: it is logged with its traceback, and the client only receives a 500.

OpenAI's client selects the class of its exception by the status, see
https://platform.openai.com/docs/guides/error-codes.
"""

import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from itertools import groupby
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from owl2.errors import ErrorCode, InputError, shorten

logger = logging.getLogger(__name__)

MAX_VALUE_LENGTH = 200  # characters of a value that a message quotes
MAX_MESSAGE_LENGTH = 1000
MAX_TRACEBACKS = 100  # in the log, so that clients cannot fill it

_logged: set[tuple[type[BaseException], str]] = set()


class ErrorInfo(BaseModel):
    """An error.

    Attributes:
        message: What is wrong, where, and what to do.
        type: The kind of the status.
        param: The field of the request, such as `messages.0.content`.
        code: The error for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or above."""

    error: ErrorInfo


class ApiError(Exception):
    """Ends a request with a status and an `ErrorResponse`."""

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
        """OpenAI's name for the kind of the status."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The body of the response; also an event of a stream that has started."""
        error = ErrorInfo(
            message=_encodable(shorten(self.message, MAX_MESSAGE_LENGTH, str)),
            type=self.type,
            param=self.param and _encodable(shorten(self.param, MAX_VALUE_LENGTH, str)),
            code=self.code,
        )
        return ErrorResponse(error=error).model_dump()

    def response(self) -> JSONResponse:
        """The complete response."""
        return JSONResponse(self.body(), self.status, self.headers)


def too_busy(reason: str) -> ApiError:
    """429."""
    return ApiError(
        429,
        f"The server is busy: {reason}. Retry later.",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def body_too_large(limit: int) -> ApiError:
    """413. `limit`: bytes."""
    return ApiError(
        413,
        f"The request body is larger than the limit of {limit:,} bytes. Send fewer or smaller "
        "images.",
        code="body_too_large",
    )


def body_too_slow(seconds: float) -> ApiError:
    """408."""
    return ApiError(
        408,
        f"The request body did not arrive within {seconds:g} seconds.",
        code="body_too_slow",
        headers={"Connection": "close"},
    )


def model_not_found(requested: str, served: Iterable[str]) -> ApiError:
    """404 for a request with another model's name."""
    names = ", ".join(f"'{name}'" for name in served)
    return ApiError(
        404,
        f"The model '{requested}' does not exist; this server has {names}.",
        code="model_not_found",
        param="model",
    )


def model_without_answers(requested: str, checkpoint: str, has_route: bool) -> ApiError:
    """400 for a request for answers to a scoring model.

    Args:
        checkpoint: The published scoring model.
        has_route: Whether the server rates images with it.
    """
    rate = f"owl2 rate IMAGES... --model {checkpoint}"
    instead = "Send images to POST /classify of this server" if has_route else f"Use `{rate}`"
    return ApiError(
        400,
        f"The model '{requested}' ({checkpoint}) gives scores and does not answer questions. "
        f"{instead}.",
        code="model_without_answers",
        param="model",
    )


def shutting_down() -> ApiError:
    """503: the server does not accept requests any more."""
    return ApiError(
        503,
        "The server is shutting down and accepts no new requests. Retry later or elsewhere.",
        code="shutting_down",
        headers={"Retry-After": "10"},
    )


def about_video(error: ApiError) -> ApiError:
    """The same error about a video, with its code."""
    message = error.message.replace("The image", "The video")
    code = error.code and error.code.replace("image", "video")
    return ApiError(error.status, message, code=code, headers=error.headers)


def as_api_error(error: BaseException) -> ApiError:
    """The error that a client receives for an exception; bugs are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        code = "context_length_exceeded" if error.code == ErrorCode.TOO_LONG else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors())
    if isinstance(error, HTTPException):
        # From Starlette and FastAPI: 400 is a body that is not UTF-8, is nested too deeply or
        # contains a number without end.
        codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
    log_bug(error)
    return ApiError(500, "Internal server error; the log of the server has the details.")


def log_bug(error: BaseException) -> None:
    """Log an unexpected exception; the traceback only if it is the first one from its line."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f"{frame[0].filename}:{frame[0].lineno}" if frame else "unknown"
    kind = (type(error), where)
    is_new = kind not in _logged and len(_logged) < MAX_TRACEBACKS
    if is_new:
        _logged.add(kind)
    name = type(error).__name__
    logger.error("A request failed: %s at %s.", name, where, exc_info=error if is_new else None)


def add_handlers(app: FastAPI) -> None:
    """Respond to every exception in `app` with an `ErrorResponse`."""

    async def respond(request: Request, error: Exception) -> JSONResponse:
        found = as_api_error(error)
        if found.code in ("not_found", "method_not_allowed") and isinstance(error, HTTPException):
            found.message = (
                f"{request.method} {request.url.path} does not exist. This server has "
                f"{', '.join(_documented_routes(app))}."
            )
        return found.response()

    for kind in (ApiError, InputError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)


def _documented_routes(app: FastAPI) -> list[str]:
    """Methods and paths of the API."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return [
        f"{'/'.join(sorted(route.methods or ()))} {route.path_format}"
        for route in routes
        if route.include_in_schema
    ]


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these statuses and all others, each with an `ErrorResponse`."""
    # Without "default", FastAPI documents a status of 422.
    descriptions = {status: HTTPStatus(status).phrase for status in statuses}
    return {
        status: {"model": ErrorResponse, "description": description}
        for status, description in (descriptions | {"default": "Any other error"}).items()
    }


def _from_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 with the first problem of a body; OpenAI's servers do not use 422."""
    first = problems[0]
    # pydantic repeats the name where a field and the tag of its type are equal.
    location = [str(step) for step, _ in groupby(first["loc"])]
    location += [first["ctx"]["field"]] if "field" in first.get("ctx", {}) else []
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    if location == ["body"] and first["type"] != "value_error":
        message = "Send a JSON object with the header 'Content-Type: application/json'."
        return ApiError(400, message, code="invalid_json")
    param = ".".join(location[1:]) or None
    where = f"'{param}'" if param else "The body"
    reason = str(first["msg"]).removeprefix("Value error, ").removesuffix(".")
    message = f"{where}: {reason[:1].lower()}{reason[1:]}"
    value = first.get("input")
    if isinstance(value, (bool, int, float, str)) and value != "":
        # Python does not convert integers with thousands of digits to text.
        is_huge = isinstance(value, int) and abs(value) >= 10**MAX_VALUE_LENGTH
        message += f" (got {'a huge number' if is_huge else shorten(value, MAX_VALUE_LENGTH)})"
    if len(problems) > 1:
        message += f"; {len(problems) - 1} more errors"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{message}.", code=code, param=param)


def _encodable(text: str) -> str:
    """Text without lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
