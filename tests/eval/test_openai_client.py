"""A chat endpoint that is slow, fails and talks nonsense."""

import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from owl2.errors import InputError
from owl2.eval.openai_client import Endpoint, NoReply
from tests.eval.stub import completion, serving


@pytest.fixture
def stub():
    with ExitStack() as stack:
        yield lambda *script: stack.enter_context(serving(*script))


def endpoint(server, **limits):
    return Endpoint(server.url, "judge-1", **{"wait": 0.01, "timeout": 5.0, **limits})


def number(reply):
    return float(reply) if reply.isdecimal() else None


def test_a_question_is_asked_as_chat_completions_are(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = stub(completion("7"))
    assert endpoint(server).ask("How many?", number) == (7.0, "7")
    [body] = server.asked
    assert body["model"] == "judge-1" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": "How many?"}]
    [(path, headers)] = server.headers
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"


def test_without_a_key_none_is_sent_and_a_whole_url_is_taken_as_it_is(stub, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub(completion("7"))
    Endpoint(f"{server.url}/chat/completions", "judge-1").ask("?", number)
    [(path, headers)] = server.headers
    assert path == "/v1/chat/completions" and "Authorization" not in headers


@pytest.mark.parametrize(
    "trouble",
    [
        (500, "oops", 0.0),
        (429, "too many", 0.0),
        (503, "", 0.0),
        (200, "<html>not JSON</html>", 0.0),
        (200, "[]", 0.0),
        (200, '{"choices": []}', 0.0),
        (200, '{"choices": [{"message": {"content": null}}]}', 0.0),
        completion("I cannot say."),
        (200, "late", 0.6),
    ],
)
def test_what_passes_is_tried_again(stub, trouble):
    server = stub(trouble, trouble, completion("7"))
    assert endpoint(server, timeout=0.3).ask("?", number) == (7.0, "7")
    assert len(server.asked) == 3


def test_what_lasts_is_reported_with_its_reason(stub):
    server = stub((500, "the disk is full", 0.0))
    with pytest.raises(NoReply, match=r"500: the disk is full \(3 attempts\)") as caught:
        endpoint(server, attempts=3).ask("?", number)
    assert caught.value.reached and len(server.asked) == 3
    with pytest.raises(NoReply, match="cannot be read: 'hm'"):
        endpoint(stub(completion("hm")), attempts=2).ask("?", number)


class Never(threading.Event):
    """Is not set, and does not wait for it."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        return False


def test_waits_double(stub):
    stop = Never()
    with pytest.raises(NoReply):
        endpoint(stub((500, "", 0)), attempts=4, wait=0.5).ask("?", number, stop)
    assert stop.pauses == [0.5, 1.0, 2.0]


def test_a_server_that_is_away_is_told_apart():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(NoReply, match="does not answer") as caught:
        Endpoint(url, "judge-1", attempts=2, wait=0.01).ask("?", number)
    assert not caught.value.reached


@pytest.mark.parametrize(("code", "what"), [(401, "the key"), (404, "the model")])
def test_a_refusal_is_the_users_and_is_not_repeated(stub, code, what, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub((code, "no", 0.0))
    with pytest.raises(InputError, match=rf"{code}: no. Check .*{what}.*is not set"):
        endpoint(server).ask("?", number)
    assert len(server.asked) == 1


def test_the_key_is_not_sent_on_to_another_place(stub):
    server = stub(completion("7"))
    other = stub((307, server.url, 0.0))
    with pytest.raises(InputError, match=f"elsewhere: give {server.url} as the URL"):
        endpoint(other).ask("?", number)
    assert server.asked == []


def test_an_objection_to_one_prompt_concerns_that_alone(stub):
    server = stub((400, "too long", 0.0), completion("7"))
    with pytest.raises(NoReply, match="400: too long"):
        endpoint(server).ask("?", number)
    assert endpoint(server).ask("?", number)[0] == 7.0


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "", "http://"])
def test_a_url_that_is_none(url):
    with pytest.raises(InputError, match="no endpoint"):
        Endpoint(url, "judge-1")


def test_what_is_stopped_is_not_tried_again(stub):
    server, stop = stub((500, "busy", 0.0)), threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(NoReply, match=r"500: busy \(then stopped\)"):
        endpoint(server, wait=30.0).ask("?", number, stop)
    assert time.monotonic() - began < 10
    assert len(server.asked) == 1


def test_a_server_that_sends_a_byte_now_and_then_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        began = time.monotonic()
        with pytest.raises(NoReply, match=r"takes more than 0\.3 s"):
            Endpoint(url, "j", timeout=0.3, attempts=1).ask("?", number)
        assert time.monotonic() - began < 3
