"""API keys and body limits are checked before the application receives a request."""

import asyncio

import pytest
from starlette.testclient import TestClient

from owl2.serve.admission import InflightBytes
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.middleware import AuthAndBodyLimitMiddleware

KEY = "an-api-key-for-tests"
VALID = {"Authorization": f"Bearer {KEY}"}
CHUNK = {"type": "http.request", "body": b"a", "more_body": True}
DISCONNECT = {"type": "http.disconnect"}


class RecordingApp:
    """An application that records the bodies it receives."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        message = await receive()
        self.bodies.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def app():
    return RecordingApp()


def protect(app, api_keys=None, public_paths=(), **limits):
    limits = ServerLimits(**limits)
    inflight = InflightBytes(limits.max_inflight_bytes)
    return AuthAndBodyLimitMiddleware(app, limits, inflight, api_keys, public_paths)


def client(app, root_path="", **options):
    public = ["/health", "/web/"]
    protected = protect(app, public_paths=public, max_body_bytes=100, body_timeout=0.2, **options)
    return TestClient(protected, root_path=root_path)


def call(middleware, messages):
    """What the client receives if it sends `messages` and then nothing."""
    sent, waiting = [], list(messages)

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/x", "method": "POST", "headers": []}
    asyncio.run(asyncio.wait_for(middleware(scope, receive, send), 5))
    return sent


def test_body_reaches_application_unchanged(app):
    assert client(app).post("/v1/chat/completions", content=b"x" * 100).text == "ok"
    assert app.bodies == [b"x" * 100]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_body_is_rejected(app, chunked):
    content = (b"x" * 10 for _ in range(11)) if chunked else b"x" * 101
    reply = client(app).post("/v1/chat/completions", content=content)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (413, "body_too_large")
    assert error["type"] == "invalid_request_error"
    assert app.bodies == []


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1", "/", "/healthy", "/webs", "/x/health", "//v1"]
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}x"}])
def test_request_without_valid_key_is_rejected_before_its_body(app, path, headers):
    reply = client(app, api_keys=ApiKeys([KEY])).post(path, content=b"x" * 101, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in reply.text
    assert app.bodies == []


def test_request_with_valid_key_is_accepted(app):
    assert client(app, api_keys=ApiKeys([KEY])).get("/v1/models", headers=VALID).text == "ok"


@pytest.mark.parametrize("path", ["/health", "/web", "/web/upload"])
def test_public_paths_have_no_key_and_no_body_limit(app, path):
    assert client(app, api_keys=ApiKeys([KEY])).post(path, content=b"x" * 1000).text == "ok"


def test_public_paths_behind_proxy_prefix(app):
    prefixed = client(app, "/owl", api_keys=ApiKeys([KEY]))
    assert prefixed.get("/owl/health").text == "ok"
    assert prefixed.get("/owl/v1/models").status_code == 401


def test_slow_body_is_rejected(app):
    sent = call(protect(app, body_timeout=0.1), [CHUNK])
    assert sent[0]["status"] == 408
    assert b"body_too_slow" in sent[1]["body"]
    assert app.bodies == []


def test_client_that_disconnects_during_body_gets_no_response(app):
    assert call(protect(app), [CHUNK, DISCONNECT]) == []
    assert app.bodies == []


def test_application_receives_joined_body_and_later_disconnect():
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    last = {"type": "http.request", "body": b"b"}
    call(protect(app), [CHUNK, last, DISCONNECT])
    assert received == [{"type": "http.request", "body": b"ab", "more_body": False}, DISCONNECT]


def test_total_size_of_unfinished_bodies_is_limited():
    events = []
    finish = asyncio.Event()

    async def app(scope, receive, send):
        await finish.wait()
        events.append("finished")

    async def post(middleware, size, client="a"):
        async def receive():
            return {"type": "http.request", "body": b"x" * size}

        async def send(message):
            if message["type"] == "http.response.start":
                events.append(message["status"])

        scope = {"type": "http", "path": "/v1/x", "headers": [], "client": (client, 1)}
        # A task of its own, as in a server
        await asyncio.ensure_future(middleware(scope, receive, send))

    async def run():
        middleware = protect(app, max_inflight_bytes=100)
        first = asyncio.ensure_future(post(middleware, 60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await post(middleware, 1)  # a client has at most half, except for one request
        await post(middleware, 41, "b")
        second = asyncio.ensure_future(post(middleware, 40, "b"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        finish.set()
        await asyncio.gather(first, second)
        await post(middleware, 100)  # everything is free again

    asyncio.run(run())
    assert events == [429, 429, "finished", "finished", "finished"]


def test_scopes_other_than_http_pass_without_key(app):
    async def fail(*_):
        raise AssertionError("nothing is received or sent")

    middleware = protect(app, ApiKeys([KEY]))
    asyncio.run(middleware({"type": "lifespan"}, fail, fail))
