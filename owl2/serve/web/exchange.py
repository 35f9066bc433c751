"""One request to the page and its response: the limits of the body, and security headers."""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Send

from owl2.serve.errors import ApiError, body_too_large, body_too_slow
from owl2.serve.middleware import check_content_length

# The browser exchanges data with this server only, whatever an answer contains. gradio has inline
# scripts and compiles templates, which need 'unsafe-inline' and 'unsafe-eval'.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'self'; form-action 'self'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class PageExchange:
    """One request and its response: limits the body and adds `HEADERS` and the cookie.

    A body ends at a limit, as if the client had disconnected.

    Attributes:
        has_started: Whether the response has started.
        cookie: The value of Set-Cookie.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._limit = self._size = 0
        self._seconds = 0.0
        self._deadline: float | None = None  # of the body
        self._is_open = False  # the response
        self._body: bytes | None = None
        self._rejection: ApiError | None = None
        self.has_started = False
        self.cookie = ""

    def limit(self, limit: int, seconds: float, headers: Headers) -> None:
        """Limit the bytes of the body, and the seconds until it has arrived.

        Raises:
            ApiError: 413, if the length in the headers exceeds the limit.
        """
        self._limit, self._seconds = limit, seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        check_content_length(headers, limit)

    def replace_body(self, body: bytes) -> None:
        """Replace the body, which has been received."""
        self._body = body

    def take_rejection(self) -> ApiError | None:
        """The error about the body, which the client receives whatever gradio responds."""
        rejection, self._rejection = self._rejection, None
        return rejection

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._rejection is not None:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self._rejection = body_too_slow(self._seconds)
            return {"type": "http.disconnect"}
        if not message.get("more_body"):
            self._deadline = None
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            self._rejection = body_too_large(self._limit)
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self._rejection is not None and not self.has_started:
            return  # the response to an incomplete body
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if self.cookie:
                headers.append("set-cookie", self.cookie)
        self._is_open = message.get("more_body", message["type"] == "http.response.start")
        await self._send(message)

    async def finish(self) -> None:
        """End a response that has started."""
        if self._is_open:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
