"""Retries and permanent errors of the client for chat endpoints."""

import asyncio
import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from owl2.errors import ErrorCode
from owl2.eval import openai_client
from owl2.eval.openai_client import ChatEndpoint, NoReplyError
from tests.errors import raises_input_error
from tests.eval.stub import completion, serving


@pytest.fixture
def stub():
    with ExitStack() as stack:
        yield lambda *script: stack.enter_context(serving(*script))


def ask(url, **limits):
    """The reply of the endpoint, which is usable if it is a number."""
    endpoint = ChatEndpoint(url, "judge-1", **{"backoff": 0.01, "timeout": 5.0, **limits})
    return asyncio.run(
        endpoint.ask("How many?", lambda reply: float(reply) if reply.isdecimal() else None)
    )


def test_request_is_a_chat_completion(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = stub(completion("7"))
    assert ask(server.url) == (7.0, "7")
    [body] = server.asked
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["messages"] == [{"role": "user", "content": "How many?"}]
    [(path, headers)] = server.headers
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"


def test_complete_url_without_a_key(stub, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub(completion("7"))
    ask(f"{server.url}/chat/completions")
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
    assert ask(server.url, timeout=0.3) == (7.0, "7")
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("step", "needle"),
    [
        ((500, "the disk is full", 0.0), "500: the disk is full (3 attempts)"),
        (completion("hm"), "'hm' (3 attempts)"),
    ],
)
def test_reason_of_the_last_failure_is_reported(stub, step, needle):
    server = stub(step)
    with pytest.raises(NoReplyError) as error:
        ask(server.url, attempts=3)
    assert needle in str(error.value)
    assert error.value.reached
    assert len(server.asked) == 3


def test_waits_between_attempts_double(stub, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(openai_client.asyncio, "sleep", sleep)
    with pytest.raises(NoReplyError):
        ask(stub((500, "", 0)).url, attempts=4, backoff=0.5)
    assert waits == [0.5, 1.0, 2.0]


def test_unreachable_server():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    with pytest.raises(NoReplyError) as error:
        ask(url, attempts=2)
    assert not error.value.reached


@pytest.mark.parametrize(("code", "needle"), [(401, "the key"), (404, "the model")])
def test_permanent_errors_are_not_retried(stub, code, needle, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub((code, "no", 0.0))
    with raises_input_error(ErrorCode.NETWORK, f"{code}: no", needle, "OPENAI_API_KEY"):
        ask(server.url)
    assert len(server.asked) == 1


def test_key_is_not_sent_to_the_target_of_a_redirect(stub):
    server = stub(completion("7"))
    other = stub((307, server.url, 0.0))
    with raises_input_error(ErrorCode.NETWORK, server.url):
        ask(other.url)
    assert server.asked == []


def test_rejected_prompt_does_not_affect_others(stub):
    server = stub((400, "too long", 0.0), completion("7"))
    with pytest.raises(NoReplyError) as error:
        ask(server.url)
    assert "400: too long" in str(error.value)
    assert ask(server.url)[0] == 7.0


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "", "http://", "http://host:port/v1"]
)
def test_invalid_url_is_an_error(url):
    with raises_input_error(ErrorCode.INVALID_VALUE, repr(url)):
        ChatEndpoint(url, "judge-1")


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
        start = time.monotonic()
        with pytest.raises(NoReplyError) as error:
            ask(f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout=0.3, attempts=1)
        assert "0.3 s" in str(error.value)
        assert time.monotonic() - start < 3
