"""An app behind a socket of loopback, as its users meet it; and an engine that does as told."""

import queue
import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def running(app):
    """The URL of `app`, served by uvicorn in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def until(condition, seconds=10.0):
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)
    return True


class Told:
    """A completion whose pieces are put in by the test: `say`, `end`, `fail`."""

    num_prompt_tokens = 7

    def __init__(self, messages, n, options):
        self.messages, self.n, self.options = messages, n, options
        self.closed = False
        self._items = queue.SimpleQueue()
        self._tokens = [0] * n

    def say(self, text, index=0, finish_reason=None):
        from owl2.engine.output import CompletionChunk

        self._tokens[index] += 1
        self._items.put(CompletionChunk(index, text, (), self._tokens[index], finish_reason))

    def end(self, reason="stop"):
        for index in range(self.n):
            self.say("", index, reason)
        self._items.put(None)

    def fail(self, error):
        self._items.put(error)

    def close(self):
        self.closed = True
        self._items.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        return self

    def __next__(self):
        item = self._items.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            raise StopIteration
        return item


class FakeEngine:
    """An `Engine` whose completions wait for the test.

    Args:
        refuse: what `complete` raises, if it is to raise.
    """

    def __init__(self, engine, refuse=None):
        self.processor, self.context, self.model = (
            engine.processor,
            engine.context_length,
            engine.model,
        )
        self.refuse = refuse
        self.asked = []

    def complete(self, messages, *, n=1, **options):
        if self.refuse is not None:
            raise self.refuse
        told = Told(messages, n, options)
        self.asked.append(told)
        return told
