"""JSON bodies: limits before they are parsed, and parsing outside the event loop.

A body of 30 MB can contain 10 million values, which takes seconds and a gigabyte to parse.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from owl2.serve.errors import ApiError

# A conversation of 3,000 messages has fewer. They are parsed and validated within 0.1 seconds.
MAX_VALUES = 2**15
# Larger bodies are counted and parsed in a thread.
MIN_THREAD_BYTES = 64 * 1024

Data = TypeVar("Data", bytes, str)
Result = TypeVar("Result")


def check_values(body: bytes, max_values: int = MAX_VALUES) -> None:
    """Reject a JSON body with more than `max_values` values and keys, before it is parsed.

    Outside strings, at least one of the characters `,:[{` precedes every value but the first. In
    UTF-16, the byte of a quote can be a part of another character, so that only UTF-8 is accepted.

    Raises:
        ApiError: 400.
    """
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise ApiError(400, "The body is not JSON in UTF-8.", code="invalid_json")
    # Most bodies have few such characters, including those in strings.
    if _count_structure(body) < max_values:
        return
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    # Every second part is a string. Keys and values that are strings have two quotes each.
    parts = unescaped.split(b'"', 2 * max_values)
    if len(parts) > 2 * max_values or _count_structure(b"".join(parts[::2])) >= max_values:
        raise ApiError(
            400,
            f"The body has more than {max_values:,} JSON values; this is not a request for an "
            "answer.",
            code="invalid_json",
        )


def _count_structure(body: bytes) -> int:
    """The number of the characters `,:[{`."""
    return sum(map(body.count, (b",", b":", b"[", b"{")))


class JsonRequest(Request):
    """A request that parses large bodies in a thread."""

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            json.JSONDecodeError: The body is not JSON.
        """
        if not hasattr(self, "_json"):
            self._json = await run_by_size(json.loads, await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route with `check_values` for its body and a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI, after the check of the body."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def check_and_handle(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            await run_by_size(check_values, await request.body())
            return await handler(request)

        return check_and_handle


async def parse_json(body: bytes, max_values: int) -> Any:
    """Parse a body.

    Raises:
        ApiError: 400: it is not JSON, or has more than `max_values` values and keys.
    """

    def parse(body: bytes) -> Any:
        check_values(body, max_values)
        return json.loads(body)

    try:
        return await run_by_size(parse, body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from error


async def run_by_size(function: Callable[[Data], Result], data: Data) -> Result:
    """The result for bytes or text, computed in a thread if they are large."""
    if len(data) < MIN_THREAD_BYTES:
        return function(data)
    return await asyncio.to_thread(function, data)
