"""Limits on connections: idle ones, slow clients, and file descriptors."""

import asyncio
import logging
import os
import resource
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # until the headers of a request are complete
SEND_SECONDS = 60.0  # until the client has received most of what waits to be sent
MAX_OPEN_FILES = 65_536
# File descriptors for everything but connections: decoders of images, files of the page, modules.
RESERVED_FILES = 24
LOG_INTERVAL_SECONDS = 60.0

logger = logging.getLogger(__name__)


def raise_open_files_limit() -> int:
    """Raise the soft limit of open files to the hard one; connections need one each.

    Returns:
        The number of connections that this process can open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has another maximum
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    soft = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, soft - len(os.listdir("/dev/fd")) - RESERVED_FILES)


class LimitedConnection(H11Protocol):
    """A connection that is closed if its client is too slow, or if too many connections are idle.

    A connection is idle while it has no request. Above a limit, the address with the most
    connections loses its oldest one: an idle one if it has any, or if too many are idle.

    Args:
        max_idle: Idle connections of all clients.
        max_connections: Connections of all clients, with requests or without.
    """

    def __init__(self, *args: Any, max_idle: int, max_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_idle = max_idle
        self._max_connections = max_connections
        self._idle_since = time.monotonic()
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._expect_headers()
        if len(self.connections) > min(self._max_idle, self._max_connections):
            self._close_excess()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        self._cancel_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # `close` would wait for the client.
        self._send_timer = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_send_timer()
        super().resume_writing()

    def _expect_headers(self) -> None:
        """Start the time limit of the headers unless it runs, or end it with their arrival."""
        if not self.is_idle or self.transport.is_closing():
            self._cancel_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _close_excess(self) -> None:
        connections: set[Any] = self.connections  # all of this class
        open_ = [one for one in connections if not one.transport.is_closing()]
        idle = [one for one in open_ if one.is_idle]
        if len(idle) <= self._max_idle and len(open_) <= self._max_connections:
            return
        candidates = idle if len(idle) > self._max_idle else open_
        counts = Counter(one.address for one in candidates)
        victim = max(
            candidates, key=lambda one: (counts[one.address], one.is_idle, -one._idle_since)
        )
        victim.transport.abort()  # without waiting for the client

    @property
    def address(self) -> str:
        """The address of the client."""
        return self.client[0] if self.client else ""


class AcceptErrors:
    """An exception handler of the event loop that logs a lack of file descriptors once a minute.

    asyncio logs it for every connection that it tries to accept, thousands of times per second.
    """

    def __init__(self) -> None:
        self._last_time = -LOG_INTERVAL_SECONDS

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an exception as the default handler, except for this one."""
        if "socket.accept() out of system resource" not in str(context.get("message")):
            loop.default_exception_handler(context)
        elif loop.time() - self._last_time >= LOG_INTERVAL_SECONDS:
            self._last_time = loop.time()
            logger.error(
                "no connection can be accepted: %s; raise the limit on open files (ulimit -n)",
                context.get("exception"),
            )
