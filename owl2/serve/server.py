"""A server's life: it takes its port, loads, says where it is, answers, finishes, ends.

The port is taken before the weights are loaded, which can take minutes, so that one that is in use
is known at once; nobody is let in before the model is there.
"""

import json
import logging
import shlex
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from owl2.errors import InputError
from owl2.serve.admission import Desk

# Clients keep connections for reuse; who closes first should not be the server.
KEEP_ALIVE_SECONDS = 75
# For connections that are still there when all answers are finished or given up.
FLUSH_SECONDS = 3

logger = logging.getLogger(__name__)


def take_port(host: str, port: int) -> socket.socket:
    """A socket of that address, bound, to which nobody can connect yet; port 0: any free one.

    Raises:
        InputError: it is in use, not allowed, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"There is no address '{host}' on this machine: {error}.") from error
    try:
        # A server that was ended a moment ago does not keep the port from the next one.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise InputError(
            f"Port {port} of {host} cannot be used: {error.strerror}. Give another with --port."
        ) from error
    return taken


def address_of(taken: socket.socket) -> str:
    """The URL at which this machine reaches it."""
    host, port = taken.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if taken.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(url: str, model: str, key: str | None = None) -> str:
    """A command that asks the model something.

    Args:
        key: what a shell makes the API key of, such as `$NAME`.
    """
    body = {"model": model, "messages": [{"role": "user", "content": "What can you see?"}]}
    words = [f"curl {url}/v1/chat/completions", "-H 'Content-Type: application/json'"]
    if key is not None:
        words.append(f'-H "Authorization: Bearer {key}"')
    return " ".join([*words, "-d", shlex.quote(json.dumps(body))])


class Server(uvicorn.Server):
    """uvicorn's, which on SIGTERM or Ctrl-C goes on answering until what it has begun is finished.

    Meanwhile it says to new requests that it is closing, instead of not being there, so that a
    balancer sends them elsewhere. A second signal, or `drain_seconds`, ends it at once.

    Attributes:
        cut_off: requests that were not finished in the end.
    """

    def __init__(
        self,
        app: FastAPI,
        desk: Desk,
        *,
        drain_seconds: float,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.desk = desk
        self.cut_off = 0
        self._drain_seconds = drain_seconds
        self._on_start = on_start
        self._signals = 0
        self._over = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients in.

        Raises:
            InputError: two servers loaded for the same port; the other one was here first.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise InputError(f"Nobody can be let in: {error}.") from error
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would stop listening at once, and raise the signal again in the end.
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to leave."""
        leaving = await super().on_tick(counter)
        if self._signals and not self.desk.closing:
            self.desk.closing = True
            self._over = time.monotonic() + self._drain_seconds
            if self.desk.inside:
                logger.info(
                    "finishing %d request(s), for at most %g s; a second signal ends at once",
                    self.desk.inside,
                    self._drain_seconds,
                )
        late = time.monotonic() > self._over or self._signals > 1
        if late and self.desk.inside and not self.cut_off:
            self.cut_off = self.desk.inside
            self.desk.stop()
            self._over = time.monotonic() + FLUSH_SECONDS  # in which they are told
            self._signals = 1
        elif late and self.cut_off:
            return True
        return leaving or (self.desk.closing and not self.desk.inside)


def serve(
    app: FastAPI,
    desk: Desk,
    taken: socket.socket,
    *,
    drain_seconds: float = 30.0,
    on_start: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal ends it; the exit code.

    It is 0 where all that was begun was finished, else 1. `on_start` is called when clients can
    connect.
    """
    server = Server(app, desk, drain_seconds=drain_seconds, on_start=on_start)
    server.run([taken])
    if server.cut_off:
        logger.warning("%d request(s) were cut off", server.cut_off)
    return 1 if server.cut_off else 0
