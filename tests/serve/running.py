"""Servers on the loopback interface, and an engine whose answers are controlled by the test."""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import uvicorn

from owl2.engine.output import CompletionChunk
from owl2.serve.admission import InflightBytes
from owl2.serve.config import ServerLimits
from owl2.serve.request_images import RequestImages


@contextmanager
def run_app(app, port=0):
    """The URL of `app`, which uvicorn serves in a thread; by default on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, ws="none"))
    with run_server(server) as address:
        yield "http://{}:{}".format(*address)


@contextmanager
def run_server(server, *sockets):
    """The address of a server that runs in a thread, on bound sockets or those of its settings."""
    thread = threading.Thread(target=server.run, args=(sockets or None,), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def request_images(processor, network=None, **limits):
    limits = ServerLimits(**limits)
    return RequestImages(limits, processor, InflightBytes(limits.max_inflight_bytes), network)


def wait_until(condition, seconds=10.0):
    """Poll a condition of another process or thread until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)
    return True


@dataclass
class FakeRequest:
    """A submitted request, whose outputs come from the test: `emit`, `end`, `fail`."""

    messages: list
    options: dict
    on_output: object
    aborted: bool = False
    num_tokens: dict = field(default_factory=dict)

    def emit(self, text, index=0, finish_reason=None):
        self.num_tokens[index] = self.num_tokens.get(index, 0) + 1
        chunk = CompletionChunk(index, text, (), self.num_tokens[index], finish_reason)
        self.on_output(chunk)

    def end(self, reason="stop"):
        for index in range(self.options.get("n", 1)):
            self.emit("", index, reason)

    def fail(self, error):
        self.on_output(error)

    def abort(self):
        self.aborted = True


class FakeEngine:
    """An `Engine` whose requests wait for the test.

    Attributes:
        error: Raised by `encode`, unless None.
        requests: The submitted `FakeRequest`s.
    """

    def __init__(self, engine, error=None):
        self.processor, self.model = engine.processor, engine.model
        self.context_length = engine.context_length
        self.adapters = ()
        self.error = error
        self.requests = []

    def sampling_params(self, **options):
        return options

    def encode(self, messages, **template_kwargs):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(messages=messages, ids=range(7))

    def submit(self, prompt, params, on_output):
        request = FakeRequest(prompt.messages, params, on_output)
        self.requests.append(request)
        return request.abort
