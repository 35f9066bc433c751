"""A chat endpoint for tests, which can be slow, fail and talk nonsense."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), 0.0


class Stub(ThreadingHTTPServer):
    """Answers with `script`, one after the other, the last for ever: (code, body, seconds)."""

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.asked, self.headers = [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next(self, body):
        self.asked.append(body)
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


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
