"""Retries and permanent errors of the client for chat endpoints."""

import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from owl2.errors import ErrorCode
from owl2.eval.openai_client import ChatEndpoint, NoReplyError
from tests.errors import raises_input_error
from tests.eval.stub import completion, serving


@pytest.fixture
def stub():
    with ExitStack() as stack:
        yield lambda *script: stack.enter_context(serving(*script))


def endpoint(server, **limits):
    return ChatEndpoint(server.url, "judge-1", **{"backoff": 0.01, "timeout": 5.0, **limits})


def number(reply):
    return float(reply) if reply.isdecimal() else None


def test_request_is_a_chat_completion(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = stub(completion("7"))
    assert endpoint(server).ask("How many?", number) == (7.0, "7")
    [body] = server.asked
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["messages"] == [{"role": "user", "content": "How many?"}]
    [(path, headers)] = server.headers
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"


def test_complete_url_without_a_key(stub, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub(completion("7"))
    ChatEndpoint(f"{server.url}/chat/completions", "judge-1").ask("?", number)
    [(path, headers)] = server.headers
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "failure",
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
def test_temporary_failures_are_retried(stub, failure):
    server = stub(failure, failure, completion("7"))
    assert endpoint(server, timeout=0.3).ask("?", number) == (7.0, "7")
    assert len(server.asked) == 3


def test_reason_of_the_last_failure_is_reported(stub):
    server = stub((500, "the disk is full", 0.0))
    with pytest.raises(NoReplyError) as error:
        endpoint(server, attempts=3).ask("?", number)
    assert "500: the disk is full (3 attempts)" in str(error.value)
    assert error.value.reached
    assert len(server.asked) == 3
    with pytest.raises(NoReplyError) as error:
        endpoint(stub(completion("hm")), attempts=2).ask("?", number)
    assert "'hm'" in str(error.value)


class NeverSet(threading.Event):
    """Is never set, and returns immediately."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return False


def test_waits_between_attempts_double(stub):
    stop = NeverSet()
    with pytest.raises(NoReplyError):
        endpoint(stub((500, "", 0)), attempts=4, backoff=0.5).ask("?", number, stop)
    assert stop.waits == [0.5, 1.0, 2.0]


def test_unreachable_server():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(NoReplyError) as caught:
        ChatEndpoint(url, "judge-1", attempts=2, backoff=0.01).ask("?", number)
    assert not caught.value.reached


@pytest.mark.parametrize(("code", "needle"), [(401, "the key"), (404, "the model")])
def test_permanent_errors_are_not_retried(stub, code, needle, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub((code, "no", 0.0))
    with raises_input_error(ErrorCode.NETWORK, f"{code}: no", needle, "OPENAI_API_KEY"):
        endpoint(server).ask("?", number)
    assert len(server.asked) == 1


def test_key_is_not_sent_to_the_target_of_a_redirect(stub):
    server = stub(completion("7"))
    other = stub((307, server.url, 0.0))
    with raises_input_error(ErrorCode.NETWORK, server.url):
        endpoint(other).ask("?", number)
    assert server.asked == []


def test_rejected_prompt_does_not_affect_others(stub):
    server = stub((400, "too long", 0.0), completion("7"))
    with pytest.raises(NoReplyError) as error:
        endpoint(server).ask("?", number)
    assert "400: too long" in str(error.value)
    assert endpoint(server).ask("?", number)[0] == 7.0


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "", "http://"])
def test_invalid_url_is_an_error(url):
    with raises_input_error(ErrorCode.INVALID_VALUE, repr(url)):
        ChatEndpoint(url, "judge-1")


def test_stop_prevents_further_attempts(stub):
    stop = threading.Event()

    def fail(body):
        stop.set()
        return 500, "busy", 0.0

    server = stub(fail)
    with pytest.raises(NoReplyError) as error:
        endpoint(server, backoff=30.0).ask("?", number, stop)
    assert "500: busy" in str(error.value)
    assert len(server.asked) == 1


def test_timeout_covers_the_complete_reply():
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
        start = time.monotonic()
        with pytest.raises(NoReplyError) as error:
            ChatEndpoint(url, "j", timeout=0.3, attempts=1).ask("?", number)
        assert "0.3 s" in str(error.value)
        assert time.monotonic() - start < 3
