"""Every exception in OpenAI's shape, and which of them are ours."""

import json
import logging

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from owl2.errors import InputError
from owl2.serve import errors
from owl2.serve.protocol import ChatCompletionRequest

GOOD = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def client():
    app = FastAPI()
    raised = {
        "input": InputError("The question is empty."),
        "ours": RuntimeError("the secret of the house"),
        "busy": errors.too_busy("7 requests are waiting"),
        "slow": errors.timed_out(2.5),
        "closing": errors.shutting_down(),
        "half": errors.ApiError(400, "\ud83d", param="a.\ud83d"),
    }

    @app.post("/v1/chat/completions")
    async def take(body: ChatCompletionRequest) -> str:
        return body.model

    @app.get("/raise/{name}")
    async def fail(name: str) -> str:
        raise raised[name]

    errors.add_handlers(app)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("name", "status", "kind", "code"),
    [
        ("input", 400, "invalid_request_error", None),
        ("busy", 429, "rate_limit_error", "rate_limit_exceeded"),
        ("slow", 503, "server_error", "timeout"),
        ("closing", 503, "server_error", "shutting_down"),
        ("ours", 500, "server_error", None),
    ],
)
def test_what_is_raised(client, name, status, kind, code):
    reply = client.get(f"/raise/{name}")
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, code)
    assert ("Retry-After" in reply.headers) == (name in ("busy", "closing"))


def test_our_own_faults_are_logged_and_not_told(client, caplog):
    with caplog.at_level(logging.ERROR, "owl2"):
        reply = client.get("/raise/ours")
    assert "secret" not in reply.text
    assert "the secret of the house" in caplog.text
    assert "Traceback" in caplog.text


def test_half_a_character_can_be_told_of(client):
    error = client.get("/raise/half").json()["error"]
    assert (error["message"], error["param"]) == ("\\ud83d", "a.\\ud83d")


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [("/v1/none", "GET", 404, "not_found"), ("/v1/chat/completions", "GET", 405, None)],
)
def test_paths_and_methods_that_there_are_not(client, path, method, status, code):
    reply = client.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == (code or "method_not_allowed")


def part(**fields):
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("change", "param", "code", "says"),
    [
        ({"temperature": "1"}, "temperature", "invalid_value", "valid number (it is '1')"),
        ({"messages": []}, "messages", "invalid_value", "at least 1"),
        ({"n": 10**300}, "n", "invalid_value", "a huge number"),
        ({"n": -(10**300)}, "n", "invalid_value", "a huge number"),
        ({"stop": ["a"] * 20}, "stop", "invalid_value", "at most 16"),
        ({"tools": [{}]}, "tools", "invalid_value", "this model cannot do that"),
        ({"frequency_penalty": 1}, "frequency_penalty", "invalid_value", "cannot do that"),
        ({"top_logprobs": 2}, None, "invalid_value", "needs logprobs"),
        (part(type="text"), "messages.0.content.0.text", "missing_required_parameter", "required"),
        (
            part(type="image_url", image_url={}),
            "messages.0.content.0.image_url.url",
            "missing_required_parameter",
            "required",
        ),
        (part(type="film"), "messages.0.content.0", "invalid_value", "'text', 'image_url'"),
        ({"temperature": "\ud83d"}, "temperature", "invalid_value", "\\ud83d"),
        ({"temperature": "long" * 1000}, "temperature", "invalid_value", "…"),
    ],
)
def test_the_field_that_is_wrong_is_named(client, change, param, code, says):
    headers = {"Content-Type": "application/json"}
    body = json.dumps(GOOD | change)  # a client's own would not send half a character
    reply = client.post("/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert says in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "m", "n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "m", "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_bodies_that_are_no_request(client, body):
    headers = {"Content-Type": "application/json"}
    reply = client.post("/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_body_without_its_type_is_told_what_to_do(client):
    reply = client.post("/v1/chat/completions", content=b"{}")
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]
