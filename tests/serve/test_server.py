"""How a server ends: what it finishes, what it refuses, when it gives up."""

import json
import signal
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest

from owl2.errors import InputError
from owl2.serve import server as module
from owl2.serve.app import build_app
from owl2.serve.server import Server, bind_socket, curl_example, serve, socket_url
from tests.serve.running import FakeEngine, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "what is this?"}]}


class Ending:
    """A `Server` in a thread, over an engine that does as told."""

    def __init__(self, tiny_engine, drain_seconds):
        self.engine = FakeEngine(tiny_engine)
        app = build_app(self.engine, "tiny")
        self.taken = bind_socket("127.0.0.1", 0)
        self.url = socket_url(self.taken)
        self.server = Server(app, app.state.admission, drain_seconds)
        self.thread = threading.Thread(target=self.server.run, args=([self.taken],))
        self.thread.start()
        wait_until(lambda: self.server.started)

    def signal(self):
        # A thread that is not the main one gets no signals: this is what would get them.
        self.server.handle_exit(signal.SIGTERM, None)

    def post(self, **more):
        return httpx.post(f"{self.url}/v1/chat/completions", json=BODY | more, timeout=20)

    @contextmanager
    def stream(self):
        """A stream that has begun, with one word."""
        url = f"{self.url}/v1/chat/completions"
        body = BODY | {"stream": True}
        with httpx.Client() as client, client.stream("POST", url, json=body) as reply:
            self.engine.asked[-1].say("a")
            lines = (line for line in reply.iter_lines() if line)
            next(lines), next(lines)
            yield lines

    def ends(self):
        self.thread.join(15)
        return not self.thread.is_alive()


@pytest.fixture
def begin(tiny_engine):
    begun = []

    def begin(drain_seconds=30):
        begun.append(Ending(tiny_engine, drain_seconds))
        return begun[-1]

    yield begin
    for one in begun:
        for _ in range(3):
            one.signal()
        assert one.ends()
        one.taken.close()


def test_with_nothing_to_do_it_ends_at_once(begin):
    one = begin()
    one.signal()
    assert one.ends()
    assert one.server.aborted == 0
    with pytest.raises(httpx.ConnectError):
        one.post()


def test_what_runs_is_finished_what_is_new_is_refused(begin):
    one = begin()
    with one.stream() as lines:
        one.signal()
        wait_until(lambda: httpx.get(f"{one.url}/health").status_code == 503)
        refused = one.post()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        told = one.engine.asked[0]
        told.say("b")
        told.end()
        assert list(lines)[-1] == "data: [DONE]"
    assert one.ends()
    assert one.server.aborted == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_what_lasts_too_long_is_told_so(begin, signals):
    one = begin(0.3 if signals == 1 else 30)
    with one.stream() as lines:
        for _ in range(signals):
            one.signal()
        last = json.loads(list(lines)[-1].removeprefix("data: "))
        assert last["error"]["code"] == "shutting_down"
    assert one.ends()
    assert one.server.aborted == 1
    assert one.engine.asked[0].aborted


def test_who_waits_for_a_whole_answer_is_told_so_too(begin):
    one = begin(0.3)
    replies = []
    thread = threading.Thread(target=lambda: replies.append(one.post()))
    thread.start()
    wait_until(lambda: one.engine.asked)
    one.signal()
    thread.join(15)
    assert replies[0].status_code == 503
    assert one.ends()


def test_a_client_that_reads_nothing_does_not_hold_it_up(begin, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.5)
    one = begin(0.3)
    with one.stream():
        for _ in range(2000):
            one.engine.asked[0].say("word " * 200)
        one.signal()
        assert one.ends()


def test_a_connection_that_is_only_open_does_not_hold_it_up(begin):
    one = begin()
    with httpx.Client() as client:
        assert client.get(f"{one.url}/health").status_code == 200
        one.signal()
        assert one.ends()


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_the_address(host, url):
    with bind_socket(host, 0) as taken:
        assert socket_url(taken).startswith(url)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_the_address_in_ipv6():
    try:
        taken = bind_socket("::1", 0)
    except InputError:
        pytest.skip("this machine has no IPv6")
    with taken:
        assert socket_url(taken).startswith("http://[::1]:")


def test_nobody_is_let_in_before_it_listens():
    with bind_socket("127.0.0.1", 0) as taken:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(taken.getsockname())
        taken.listen()
        with pytest.raises(InputError, match="cannot be used"):
            bind_socket(*taken.getsockname())


def test_of_two_that_loaded_for_one_port_the_second_says_so(tiny_engine):
    with bind_socket("127.0.0.1", 0) as first, bind_socket(*first.getsockname()) as second:
        first.listen()
        app = build_app(FakeEngine(tiny_engine), "tiny")
        with pytest.raises(InputError, match="in use"):
            serve(app, app.state.admission, second)


def test_the_line_survives_a_name_with_quotes():
    line = curl_example("http://h:1", 'it\'s "mine" $HOME', "$(cat key)")
    assert "'\"'\"'" in line
    assert '-H "Authorization: Bearer $(cat key)"' in line
