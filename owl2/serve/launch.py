"""`owl2 serve`, from its configuration to its exit code.

::

    options ──► bind the port ──► read the keys ──► load the model, warm it up ──► serve

Errors in the options, such as a port in use, are reported before the weights are loaded, which can
take minutes. Clients can connect after the model is loaded.
"""

import asyncio
import base64
import io
import ipaddress
import json
import logging
import shlex
import socket
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.scoring.comparison import anchor_images
from owl2.scoring.methods import check_answers, score_only_checkpoint
from owl2.serve.admission import AdmissionController
from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from owl2.serve.classify import find_methods, make_scorers
from owl2.serve.config import ServerConfig
from owl2.serve.connections import AcceptErrors, LimitedConnection, raise_open_files_limit
from owl2.serve.origins import parse_hosts, parse_origins

# Longer than the timeouts of clients and proxies, which should close idle connections first.
KEEP_ALIVE_SECONDS = 75
# For connections that are still open after all requests have finished or were aborted.
FLUSH_SECONDS = 3

logger = logging.getLogger(__name__)


def serve_model(config: ServerConfig) -> int:
    """Serve until a signal arrives.

    Returns:
        The exit code: 0 if every request was finished and the shutdown succeeded, otherwise 1.

    Raises:
        InputError: An option, the model or the port is invalid.
    """
    name, adapters = config.model_name, config.adapters
    api_keys = ApiKeys.read(config.api_key_env, config.api_key_file)
    if config.web:
        check_answers(config.model)  # the page has a chat
    checkpoints = {
        key: score_only_checkpoint(path) for key, path in {name: config.model, **adapters}.items()
    }
    score_only = {key: known for key, known in checkpoints.items() if known is not None}
    examples = None
    if config.examples is not None:
        from owl2.serve.web.examples import read_examples

        examples = read_examples(config.examples)
    origins = parse_origins(config.allowed_origins or "")
    hosts = None if config.allowed_hosts is None else parse_hosts(config.allowed_hosts)
    with bind_socket(config.host, config.port) as bound:
        url = socket_url(bound)
        is_loopback = ipaddress.ip_address(bound.getsockname()[0]).is_loopback
        if hosts is None and is_loopback:
            hosts = []  # localhost only
        models = {name: (config.model, config.base)}
        models |= {adapter: (path, config.model) for adapter, path in adapters.items()}
        anchors = anchor_images(None if config.anchors is None else expand_user(config.anchors))
        methods = find_methods(models, anchors, score_only)
        engine = _load_engine(config)
        scorers = make_scorers(engine, methods, anchors)
        example = curl_example(
            url, name, key_expression(config), has_answers=name not in score_only
        )
        app = build_app(
            engine, name, config, api_keys, example, hosts, origins, scorers, score_only
        )
        if config.web:
            from owl2.serve.web.mount import mount

            mount(
                app,
                engine,
                config,
                keys=api_keys,
                name=name,
                examples=examples,
                allowed_origins=origins,
            )
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("owl2.serve").setLevel(logging.INFO)
        if api_keys is None and not is_loopback:
            logger.warning(
                "the server accepts requests from every client that reaches this machine; require "
                "API keys with --api-key-file or --api-key-env"
            )
        print_urls = partial(_print_urls, config, engine, url, example)
        return Server(app, config.shutdown_timeout, print_urls).serve_until_signal(bound)


def _load_engine(config: ServerConfig) -> Engine:
    """The engine, which has answered a short question with each adapter.

    The first token reports errors and pays one-time costs before the first request.
    """
    print(f"Loading {config.model} ...", flush=True)
    engine = Engine.from_pretrained(
        config.model,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        activation_bits=config.activation_bits,
        base=config.base,
        max_num_batched_tokens=config.max_num_batched_tokens,
        adapters=config.adapters,
    )
    structured = {"choice": ["Hello"]} if find_spec("llguidance") else None
    hello = [{"role": "user", "content": "Hello?"}]
    for adapter in (None, *engine.adapters):
        engine.chat(hello, adapter, max_new_tokens=1, structured_outputs=structured)
    return engine


def _print_urls(config: ServerConfig, engine: Engine, url: str, example: str) -> None:
    dtype = str(engine.model.dtype).removeprefix("torch.")
    print(f"Serving {config.model_name} on {engine.model.device} in {dtype} at {url}/v1")
    if engine.adapters:
        print(f"Adapters: {', '.join(engine.adapters)}")
    print(f"API documentation: {url}/docs")
    if config.web:
        print(f"Web page: {url}/web")
    print(f"Example request:\n{example}\nPress Ctrl-C to stop.", flush=True)


def curl_example(url: str, model: str, key: str | None = None, *, has_answers: bool = True) -> str:
    """A shell command that sends a request.

    Args:
        key: A shell expression for the API key, such as `$NAME`.
        has_answers: Whether the model answers questions; otherwise it rates a gray image.
    """
    content: Any = "What can you see?"
    if not has_answers:
        file = io.BytesIO()
        Image.new("L", (8, 8), 128).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    route = "/v1/chat/completions" if has_answers else "/classify"
    parts = [f"curl {url}{route}", "-H 'Content-Type: application/json'"]
    if key is not None:
        parts.append(f'-H "Authorization: Bearer {key}"')
    return " ".join([*parts, "-d", shlex.quote(json.dumps(body))])


def key_expression(config: ServerConfig) -> str | None:
    """A shell expression for an API key: the printed example must not contain the key itself."""
    if config.api_key_env is not None:
        return f"${{{config.api_key_env}%%,*}}"
    if config.api_key_file is not None:
        first_key = "^[[:space:]]*[^#[:space:]]"
        return f"$(grep -m 1 '{first_key}' {shlex.quote(config.api_key_file)})"
    return None


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 selects a free port.

    Raises:
        InputError: The address does not exist, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"The address '{host}' does not exist on this machine: {error}.", ErrorCode.NETWORK
        ) from error
    try:
        # A port stays reserved for a while after its server has ended.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"Port {port} of {host} cannot be used: {error.strerror}. Select another with --port.",
            ErrorCode.NETWORK,
        ) from error
    return bound


def socket_url(bound: socket.socket) -> str:
    """The URL for clients on this machine."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if bound.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Finishes its requests after SIGTERM or Ctrl-C, and rejects new ones with 503.

    It keeps listening meanwhile, so that load balancers receive the 503. A second signal or
    `shutdown_timeout` aborts the remaining requests.

    Args:
        app: As from `build_app`.
        shutdown_timeout: Seconds for unfinished requests.
        on_start: Called when clients can connect.

    Attributes:
        aborted: Number of requests that were aborted.
    """

    def __init__(
        self,
        app: FastAPI,
        shutdown_timeout: float = 30.0,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._admission: AdmissionController = app.state.admission
        config = uvicorn.Config(
            app,
            http=partial(  # type: ignore[arg-type]  # uvicorn only calls it
                LimitedConnection,
                max_idle=self._admission.limits.max_idle_connections,
                max_connections=raise_open_files_limit(),
            ),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.aborted = 0
        self._shutdown_timeout = shutdown_timeout
        self._on_start = on_start
        self._signals = 0
        self._deadline = float("inf")

    def serve_until_signal(self, bound: socket.socket) -> int:
        """Serve on a bound socket until a signal arrives.

        Returns:
            The exit code: 0 if every request was finished and the shutdown succeeded, otherwise 1.
        """
        self.run([bound])
        if self.aborted:
            logger.warning("%d request(s) were aborted", self.aborted)
        # `should_exit`: the startup or the shutdown of the application failed.
        return 1 if self.aborted or self.lifespan.should_exit else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        Raises:
            InputError: Another server that was loading at the same time uses the port.
        """
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise InputError(f"The port cannot be used: {error}.", ErrorCode.NETWORK) from error
        if not self.lifespan.should_exit:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's method would stop listening, and raise the signal again at the end.
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second; whether the server must stop."""
        must_stop = await super().on_tick(counter)
        admission = self._admission
        if self._signals and not admission.shutting_down:
            admission.shutting_down = True
            self._deadline = time.monotonic() + self._shutdown_timeout
            if admission.in_flight:
                logger.info(
                    "finishing %d request(s) within %g s; a second signal aborts them",
                    admission.in_flight,
                    self._shutdown_timeout,
                )
        is_late = time.monotonic() > self._deadline or self._signals > 1
        if is_late and admission.in_flight and not self.aborted:
            self.aborted = admission.in_flight
            admission.abort_all()
            self._deadline = time.monotonic() + FLUSH_SECONDS  # to send the errors
            self._signals = 1
        elif is_late and self.aborted:
            return True
        return must_stop or (admission.shutting_down and not admission.in_flight)
