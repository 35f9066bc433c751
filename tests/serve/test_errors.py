"""Every exception becomes an OpenAI error with its status, and bugs stay internal."""

import json
import logging

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from owl2.errors import ErrorCode, InputError
from owl2.serve import errors
from owl2.serve.protocol import ChatCompletionRequest

VALID = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
JSON = {"Content-Type": "application/json"}
SECRET = "internal detail"


@pytest.fixture
def client():
    app = FastAPI()
    raised = {
        "input": InputError("The question is empty.", ErrorCode.EMPTY_MESSAGE),
        "long": InputError("The prompt is too long.", ErrorCode.TOO_LONG),
        "bug": RuntimeError(SECRET),
        "frequent bug": ZeroDivisionError(SECRET),
        "busy": errors.too_busy("7 requests are waiting"),
        "shutdown": errors.shutting_down(),
        "surrogate": errors.ApiError(400, "\ud83d", param="a.\ud83d"),
        "long names": errors.ApiError(400, "x" * 10**6, param="y" * 10**6),
    }

    @app.post("/v1/chat/completions")
    async def create(body: ChatCompletionRequest) -> str:
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
        ("long", 400, "invalid_request_error", "context_length_exceeded"),
        ("busy", 429, "rate_limit_error", "rate_limit_exceeded"),
        ("shutdown", 503, "server_error", "shutting_down"),
        ("bug", 500, "server_error", None),
    ],
)
def test_exceptions_have_status_type_and_code(client, name, status, kind, code):
    reply = client.get(f"/raise/{name}")
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (reply.status_code, error["type"], error["code"]) == (status, kind, code)
    assert ("Retry-After" in reply.headers) == (name in ("busy", "shutdown"))


def test_bugs_are_logged_and_not_sent_to_clients(client, caplog):
    with caplog.at_level(logging.ERROR, "owl2"):
        replies = [client.get("/raise/frequent bug") for _ in range(3)]
    assert [SECRET in reply.text for reply in replies] == [False] * 3
    assert len(caplog.records) == 3
    assert SECRET in caplog.text
    assert caplog.text.count("Traceback") == 1  # the first time


def test_long_names_of_fields_are_shortened(client):
    error = client.get("/raise/long names").json()["error"]
    assert error["param"].startswith("yyy")
    assert len(error["param"]) + len(error["message"]) < 1500


def test_lone_surrogates_are_escaped(client):
    error = client.get("/raise/surrogate").json()["error"]
    assert (error["message"], error["param"]) == ("\\ud83d", "a.\\ud83d")


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/v1/none", "GET", 404, "not_found"),
        ("/v1/chat/completions", "GET", 405, "method_not_allowed"),
    ],
)
def test_unknown_paths_and_methods(client, path, method, status, code):
    reply = client.request(method, path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def part(**fields):
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("change", "param", "code", "value"),
    [
        ({"temperature": "1"}, "temperature", "invalid_value", "'1'"),
        ({"messages": []}, "messages", "invalid_value", "1"),
        ({"n": 10**300}, "n", "invalid_value", "n"),
        ({"n": -(10**300)}, "n", "invalid_value", "n"),
        ({"stop": ["a"] * 20}, "stop", "invalid_value", "16"),
        ({"tools": [{}]}, "tools", "invalid_value", "tools"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value", "frequency_penalty"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "logprobs: true"),
        (part(type="text"), "messages.0.content.0.text", "missing_required_parameter", "text"),
        (
            part(type="image_url", image_url={}),
            "messages.0.content.0.image_url.url",
            "missing_required_parameter",
            "url",
        ),
        (part(type="film"), "messages.0.content.0", "invalid_value", "'text', 'image_url'"),
        ({"temperature": "\ud83d"}, "temperature", "invalid_value", "\\ud83d"),
        ({"temperature": "long" * 1000}, "temperature", "invalid_value", "…"),
    ],
)
def test_invalid_field_is_named(client, change, param, code, value):
    body = json.dumps(VALID | change)  # httpx would not encode a lone surrogate
    reply = client.post("/v1/chat/completions", content=body, headers=JSON)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code)
    assert value in error["message"]
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
def test_malformed_bodies_are_rejected(client, body):
    reply = client.post("/v1/chat/completions", content=body, headers=JSON)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_missing_content_type_is_explained(client):
    reply = client.post("/v1/chat/completions", content=b"{}")
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]
