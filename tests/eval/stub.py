"""A chat endpoint for tests that can be slow, fail and reply with invalid data."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), 0.0


class Stub(ThreadingHTTPServer):
    """Replies with `script` in order, and repeats the last entry: (code, body, seconds)."""

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.asked, self.headers = [], []
        self.lock = threading.Lock()
        self.requested = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def another_request(self, timeout):
        """Whether a request arrives within the time."""
        self.requested.clear()
        return self.requested.wait(timeout)

    def next(self, body):
        self.asked.append(body)
        self.requested.set()
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def handle_error(self, request, client_address):
        """Clients that close the connection are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.headers.append((self.path, dict(self.headers)))
            step = self.server.next(body)
        code, text, seconds = step(body) if callable(step) else step
        time.sleep(seconds)
        self.send_response(code)
        if code in (301, 307):
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextmanager
def serving(*script) -> Iterator[Stub]:
    server = Stub(*script)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
