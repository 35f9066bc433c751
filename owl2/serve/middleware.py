"""What a request passes before anything is made of it: its key, and the size of its body.

::

    request ──key──► 401 ──length, seconds──► 413, 408 ──► the application, with the body in hand

An ASGI middleware: the application itself would read all of a body before it asks for the key.
"""

import asyncio
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl2.serve.auth import Keys
from owl2.serve.errors import ApiError
from owl2.serve.limits import Limits


class Door:
    """The middleware; `app.add_middleware(Door, limits=..., keys=..., free=...)`.

    Args:
        keys: None: everyone may ask.
        free: paths, with what is below them, that need no key and whose bodies are their own
            business. Every other path is closed.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Keys | None = None, free: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._limits = limits
        self._keys = keys
        self._free = tuple(path.rstrip("/") for path in free)
        self._held = 0  # bytes of bodies whose requests are not finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_free(scope):
            await self._app(scope, receive, send)
            return
        body = _Body()
        try:
            try:
                has_come = await self._take(scope, receive, body)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            if has_come:
                await self._app(scope, _with_body(body.joined(), receive), send)
        finally:
            self._held -= body.size

    def _is_free(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return any(path == free or path.startswith(f"{free}/") for free in self._free)

    async def _take(self, scope: Scope, receive: Receive, body: "_Body") -> bool:
        """Fill `body`; False: the client left.

        Raises:
            ApiError: it may not come in.
        """
        headers = Headers(scope=scope)
        if self._keys is not None:
            given = headers.get("authorization")
            self._keys.check(None if given is None else given.encode("latin-1"))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limits.body_bytes:
            raise self._too_large()
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._read(receive, body)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"The body of the request did not come within {seconds:g} seconds.",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from error

    async def _read(self, receive: Receive, body: "_Body") -> bool:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            body.add(chunk)
            self._held += len(chunk)
            if body.size > self._limits.body_bytes:
                raise self._too_large()
            if self._held > self._limits.held_bytes:
                raise ApiError(
                    429,
                    "The server is busy: it has no more room for requests of this size. Ask again "
                    "in a moment.",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": "1"},
                )
            more = message.get("more_body", False)
        return True

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body of the request is larger than {self._limits.body_bytes:,} bytes, which is "
            "this server's limit. Send fewer or smaller images.",
            code="body_too_large",
        )


class _Body:
    """What has come of a body so far."""

    def __init__(self) -> None:
        self.size = 0
        self._chunks: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._chunks.append(chunk)

    def joined(self) -> bytes:
        """All of it, which is not kept here any longer."""
        chunks, self._chunks = self._chunks, []
        return b"".join(chunks)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """`receive` as it was before the body was read; after it comes only that the client left."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
