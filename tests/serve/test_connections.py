"""Limits on connections: idle ones, late headers, and file descriptors."""

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack

import httpx
import pytest

from owl2.serve import connections, generation, launch
from owl2.serve.app import build_app
from owl2.serve.config import ServerLimits
from owl2.serve.connections import AcceptErrors, raise_open_files_limit
from owl2.serve.launch import Server, bind_socket
from tests.serve.running import FakeEngine, run_server, wait_until

REQUEST = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def serve(tiny_engine):
    """`serve(**limits)` is the address of a server."""
    with ExitStack() as stack:

        def start(**limits):
            app = build_app(FakeEngine(tiny_engine), "tiny", ServerLimits(**limits))
            bound = stack.enter_context(bind_socket("127.0.0.1", 0))
            return stack.enter_context(run_server(Server(app), bound))

        yield start


def is_closed(connection, seconds=10):
    connection.settimeout(seconds)
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def ask(connection):
    connection.settimeout(10)
    connection.sendall(REQUEST)
    reply = b""
    while not reply.endswith(b"}"):
        reply += connection.recv(1000)
    assert reply.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("requests", [0, 1])
@pytest.mark.parametrize("sent", [b"G", REQUEST[:-2]])
def test_late_headers_close_the_connection(serve, monkeypatch, requests, sent):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with socket.create_connection(serve()) as connection:
        for _ in range(requests):
            ask(connection)
        connection.sendall(sent)
        assert is_closed(connection)


def test_silent_connection_is_closed(serve, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    with socket.create_connection(serve()) as connection:
        assert is_closed(connection)


def test_connection_between_requests_is_kept(serve, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    with socket.create_connection(serve()) as connection:
        ask(connection)
        assert not is_closed(connection, 0.4)
        ask(connection)


def test_oldest_idle_connection_is_closed_beyond_the_limit(serve):
    address = serve(max_idle_connections=3)
    with ExitStack() as stack:
        opened = []
        for _ in range(5):
            opened.append(stack.enter_context(socket.create_connection(address)))
            ask(opened[-1])
        assert [is_closed(one, 0.2) for one in opened] == [True, True, False, False, False]
        assert httpx.get("http://{}:{}/health".format(*address)).status_code == 200


def test_connections_are_limited_by_file_descriptors(serve, monkeypatch):
    monkeypatch.setattr(launch, "raise_open_files_limit", lambda: 5)
    address = serve()
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(address)) for _ in range(9)]
        assert httpx.get("http://{}:{}/health".format(*address)).status_code == 200
        assert sum(is_closed(one, 0.1) for one in opened) >= 4


def test_beyond_the_limit_the_client_with_the_most_connections_loses_one(serve, monkeypatch):
    """Requests whose bodies never arrive must not lock out other clients."""
    monkeypatch.setattr(launch, "raise_open_files_limit", lambda: 5)
    address = serve()
    with ExitStack() as stack:
        opened = []
        for _ in range(5):
            opened.append(stack.enter_context(socket.create_connection(address)))
            opened[-1].sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
            )
        assert not any(is_closed(one, 0.05) for one in opened)
        other = socket.create_connection(address, source_address=("127.0.0.2", 0))
        ask(stack.enter_context(other))
        assert sum(is_closed(one, 0.1) for one in opened) == 1


def test_client_that_does_not_read_is_disconnected(tiny_engine, monkeypatch, caplog):
    """It leaves no traceback, whether its connection or its request reaches a time limit."""
    stream = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": True}
    body = json.dumps(stream).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    engine = FakeEngine(tiny_engine)
    app = build_app(engine, "tiny", ServerLimits(request_timeout=0.5))
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.4)
    monkeypatch.setattr(generation, "FLUSH_SECONDS", 0.1)
    with bind_socket("127.0.0.1", 0) as bound, run_server(Server(app), bound) as address:
        for is_slow_sender in (False, True):
            if is_slow_sender:
                monkeypatch.setattr(connections, "SEND_SECONDS", 60.0)
            with socket.create_connection(address) as connection:
                connection.sendall(head.encode() + body)
                wait_until(lambda: engine.requests)
                for _ in range(20):
                    engine.requests[0].emit("x" * 2**20)
                wait_until(lambda: not app.state.admission.in_flight)
                engine.requests.clear()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.slow
def test_silent_connections_do_not_exhaust_file_descriptors(tmp_path):
    """With 64 file descriptors and 100 silent connections, the server answers and logs little."""
    script = tmp_path / "serve.py"
    script.write_text(
        "from fastapi import FastAPI\n"
        "from types import SimpleNamespace\n"
        "from owl2.serve.config import ServerLimits\n"
        "from owl2.serve.launch import Server, bind_socket\n"
        "app = FastAPI()\n"
        "app.state.admission = SimpleNamespace(limits=ServerLimits(), in_flight=0, "
        "shutting_down=False)\n"
        "@app.get('/health')\n"
        "def health(): return {}\n"
        "bound = bind_socket('127.0.0.1', 0)\n"
        "Server(app, on_start=lambda: print(bound.getsockname()[1], flush=True))"
        ".serve_until_signal(bound)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        address = "127.0.0.1", int(process.stdout.readline())
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection(address, timeout=10))
            reply = httpx.get("http://{}:{}/health".format(*address), timeout=10)
            assert reply.status_code == 200
    finally:
        process.kill()
    assert len(process.communicate()[1]) < 10_000


def test_soft_limit_of_open_files_is_raised():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, used + 300))
            available = raise_open_files_limit()
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            code = 0 if soft == used + 300 and 200 < available < 300 else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert raise_open_files_limit() > 0


def test_lack_of_file_descriptors_is_logged_once(caplog):
    async def run():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(AcceptErrors())
        error = OSError(errno.EMFILE, "Too many open files")
        for _ in range(1000):
            message = "socket.accept() out of system resource"
            loop.call_exception_handler({"message": message, "exception": error})
        loop.call_exception_handler({"message": "another error"})

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert caplog.text.count("Too many open files") == 1
    assert caplog.text.count("another error") == 1
