"""Shutdown: which requests are finished, rejected and aborted. Sockets and the curl example."""

import json
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager

import httpx
import pytest

from owl2.errors import ErrorCode, InputError
from owl2.serve import launch
from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerConfig
from owl2.serve.launch import Server, bind_socket, curl_example, key_expression, socket_url
from tests.errors import raises_input_error
from tests.serve.running import FakeEngine, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "what is this?"}]}


class ThreadedServer:
    """A `Server` in a thread, with a fake engine."""

    def __init__(self, tiny_engine, shutdown_timeout):
        self.engine = FakeEngine(tiny_engine)
        app = build_app(self.engine, "tiny")
        self.bound = bind_socket("127.0.0.1", 0)
        self.url = socket_url(self.bound)
        self.server = Server(app, shutdown_timeout)
        self.thread = threading.Thread(target=self.server.run, args=([self.bound],))
        self.thread.start()
        wait_until(lambda: self.server.started)

    def signal(self):
        # Only the main thread receives signals, so the handler is called directly.
        self.server.handle_exit(signal.SIGTERM, None)

    def post(self):
        return httpx.post(f"{self.url}/v1/chat/completions", json=BODY, timeout=20)

    @contextmanager
    def stream(self):
        """The lines of a stream after its first text."""
        url = f"{self.url}/v1/chat/completions"
        body = BODY | {"stream": True}
        with httpx.Client() as client, client.stream("POST", url, json=body) as reply:
            self.engine.requests[-1].emit("a")
            lines = (line for line in reply.iter_lines() if line)
            next(lines), next(lines)
            yield lines

    def has_ended(self):
        self.thread.join(15)
        return not self.thread.is_alive()


@pytest.fixture
def start(tiny_engine):
    started = []

    def start(shutdown_timeout=30):
        started.append(ThreadedServer(tiny_engine, shutdown_timeout))
        return started[-1]

    yield start
    for one in started:
        for _ in range(3):
            one.signal()
        assert one.has_ended()
        one.bound.close()


def test_idle_server_ends_after_signal(start):
    one = start()
    one.signal()
    assert one.has_ended()
    assert one.server.aborted == 0
    with pytest.raises(httpx.ConnectError):
        one.post()


def test_running_request_is_finished_and_new_one_rejected(start):
    one = start()
    with one.stream() as lines:
        one.signal()
        wait_until(lambda: httpx.get(f"{one.url}/health").status_code == 503)
        rejected = one.post()
        assert rejected.status_code == 503
        assert rejected.json()["error"]["code"] == "shutting_down"
        request = one.engine.requests[0]
        request.emit("b")
        request.end()
        assert list(lines)[-1] == "data: [DONE]"
    assert one.has_ended()
    assert one.server.aborted == 0


@pytest.mark.parametrize(("signals", "shutdown_timeout"), [(1, 0.3), (2, 30)])
def test_timeout_or_second_signal_aborts_streams(start, signals, shutdown_timeout):
    one = start(shutdown_timeout)
    with one.stream() as lines:
        for _ in range(signals):
            one.signal()
        last = json.loads(list(lines)[-1].removeprefix("data: "))
        assert last["error"]["code"] == "shutting_down"
    assert one.has_ended()
    assert one.server.aborted == 1
    assert one.engine.requests[0].aborted


def test_timeout_aborts_requests_without_stream(start):
    one = start(0.3)
    replies = []
    thread = threading.Thread(target=lambda: replies.append(one.post()))
    thread.start()
    wait_until(lambda: one.engine.requests)
    one.signal()
    thread.join(15)
    assert replies[0].status_code == 503
    assert one.has_ended()


def test_client_that_does_not_read_does_not_delay_shutdown(start, monkeypatch):
    monkeypatch.setattr(launch, "FLUSH_SECONDS", 0.5)
    one = start(0.3)
    with one.stream():
        for _ in range(2000):
            one.engine.requests[0].emit("word " * 200)
        one.signal()
        assert one.has_ended()


def test_idle_connection_does_not_delay_shutdown(start):
    one = start()
    with httpx.Client() as client:
        assert client.get(f"{one.url}/health").status_code == 200
        one.signal()
        assert one.has_ended()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_url_of_ipv4_sockets(host):
    with bind_socket(host, 0) as bound:
        assert socket_url(bound).startswith("http://127.0.0.1:")


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_url_of_ipv6_sockets():
    try:
        bound = bind_socket("::1", 0)
    except InputError:
        pytest.skip("this machine has no IPv6")
    with bound:
        assert socket_url(bound).startswith("http://[::1]:")


def test_bound_socket_refuses_connections_until_it_listens():
    with bind_socket("127.0.0.1", 0) as bound:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(bound.getsockname())
        bound.listen()
        with raises_input_error(ErrorCode.NETWORK, bound.getsockname()[1]):
            bind_socket(*bound.getsockname())


def test_second_server_on_the_same_port_fails_when_it_listens(tiny_engine):
    with bind_socket("127.0.0.1", 0) as first, bind_socket(*first.getsockname()) as second:
        first.listen()
        app = build_app(FakeEngine(tiny_engine), "tiny")
        with raises_input_error(ErrorCode.NETWORK):
            Server(app).serve_until_signal(second)


def test_curl_example_quotes_the_model_name():
    line = curl_example("http://h:1", 'it\'s "mine" $HOME', "$(cat key)")
    assert "'\"'\"'" in line
    assert '-H "Authorization: Bearer $(cat key)"' in line


def test_key_of_the_example_is_the_first_one_of_the_file(tmp_path):
    file = tmp_path / "it's keys"
    file.write_text("# a comment\n  # another\n\n  \n the-first-key\nthe-second-key\n")
    config = ServerConfig(model="any", api_key_file=str(file))
    assert ApiKeys.read(None, file).is_valid("the-first-key")
    shell = f'printf %s "{key_expression(config)}"'
    printed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "the-first-key"
