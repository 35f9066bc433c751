"""ASGI middlewares: hosts and origins, API keys and body limits, the log and metrics of requests.

::

    request ──► log, count ──► host, origin: 403 ──► CORS headers
            ──► API key: 401 ──► size and time of the body: 413, 408 ──► application

The application would read the complete body before it could check the key; the middleware checks
the key first and passes the body on when it is complete.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl2.serve.admission import ClientStopped, InflightBytes, current_client, run_unless
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError, as_api_error, body_too_large, body_too_slow
from owl2.serve.metrics import Metrics
from owl2.serve.origins import check_host, check_origin, client_network, forwarded_host

WEB_PATH = "/web"
# Methods that change nothing. Other websites may send them: browsers hide the answers.
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected; only metrics show it

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger(__name__)


class RequestGuardMiddleware:
    """Rejects requests for other hosts and of other websites, and answers HEAD requests.

    Args:
        allowed_hosts: See `check_host`.
        allowed_origins: See `check_origin`.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Collection[str] | None = None,
        allowed_origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._allowed_origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            await self._answer_head(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = MutableHeaders(scope=scope)
        check_host(headers, self._allowed_hosts)
        if (host := forwarded_host(headers, self._allowed_hosts)) is not None:
            headers["host"] = host
        if scope["method"] not in SAFE_METHODS:
            check_origin(headers, self._allowed_origins)
        # A proxy could use the other length, and take the rest of the body for another request.
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(
                400,
                "A request has either Content-Length or Transfer-Encoding.",
                code="invalid_headers",
                headers={"Connection": "close"},
            )

    async def _answer_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers of the response to GET. A stream ends before its first event."""
        sent = asyncio.Event()

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                sent.set()

        get = {**scope, "method": "GET"}

        async def answer() -> None:
            await self._app(get, receive, send_headers)

        try:
            with suppress(ClientStopped):
                await run_unless(sent.wait(), answer())
        finally:
            scope["route"] = get.get("route")  # for the log


class AuthAndBodyLimitMiddleware:
    """Rejects requests without a valid key, and bodies that are too large or too slow.

    Args:
        api_keys: None: every client is accepted.
        public_paths: Paths that need no key and check their own bodies, with everything below them.
            All other paths are protected.
        inflight: Counts the bytes of bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: ServerLimits,
        inflight: InflightBytes,
        api_keys: ApiKeys | None = None,
        public_paths: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._limits = limits
        self._inflight = inflight
        self._api_keys = api_keys
        self._public_paths = tuple(path.rstrip("/") for path in public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_public(scope):
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            current_client.set(self._identify_client(scope, headers))
            check_content_length(headers, self._limits.max_body_bytes)
            with self._inflight.count() as add:
                body = await self._receive_body(Request(scope, receive), add)
                messages = iter([{"type": "http.request", "body": body, "more_body": False}])

                async def receive_again() -> Message:
                    return next(messages, None) or await receive()

                await self._app(scope, receive_again, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except ClientDisconnect:
            return

    def _is_public(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return any(path == public or path.startswith(f"{public}/") for public in self._public_paths)

    def _identify_client(self, scope: Scope, headers: Headers) -> str:
        """The client: its API key, or without keys its address."""
        if self._api_keys is not None:
            return self._api_keys.check(headers.get("authorization", ""))
        return client_network(scope.get("client"))

    async def _receive_body(self, request: Request, add: Callable[[int], None]) -> bytearray:
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    add(len(chunk))
                    if len(body) > self._limits.max_body_bytes:
                        raise body_too_large(self._limits.max_body_bytes)
        except TimeoutError as error:
            raise body_too_slow(self._limits.body_timeout) from error
        return body


def check_content_length(headers: Headers, limit: int) -> None:
    """Reject a body before it arrives if its length in the headers exceeds `limit` bytes.

    Raises:
        ApiError: 413.
    """
    length = headers.get("content-length", "")
    # Longer numbers are as large; Python does not convert thousands of digits.
    if length.isdecimal() and int(length[:20]) > limit:
        raise body_too_large(limit)


class RequestLogMiddleware:
    """Counts requests by route and status, and logs one line for each.

    The line contains the pattern of the route and nothing that the client sent: no key, no text,
    only its `X-Request-ID`, a short word. The response has the same id, or a new one.
    Unexpected exceptions become a response here. Starlette would raise them again after its
    response, and the server would close a connection that the client keeps for reuse.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 0
        given = REQUEST_ID.fullmatch(Headers(scope=scope).get("x-request-id", ""))
        request_id = given[0] if given else uuid.uuid4().hex

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        except Exception as error:  # a bug in the server; as_api_error logs it
            if status:
                raise  # the response has started: the connection must be closed
            await as_api_error(error).response()(scope, receive, record_status)
        finally:
            # The page consists of a hundred files: one route, and logged at a lower level.
            is_page = scope["path"].startswith(f"{WEB_PATH}/")
            route = WEB_PATH if is_page else getattr(scope.get("route"), "path", "none")
            status = status or CLIENT_CLOSED_REQUEST
            self._metrics.requests.labels(route, status).inc()
            client = scope["client"][0] if scope.get("client") else "-"
            seconds = time.perf_counter() - start
            level = logging.DEBUG if is_page else logging.INFO
            line = "%s %s %s %d %.2f s %s"
            logger.log(level, line, client, scope["method"], route, status, seconds, request_id)
