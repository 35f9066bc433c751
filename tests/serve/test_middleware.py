"""What is refused before the application hears of it."""

import asyncio

import pytest
from starlette.testclient import TestClient

from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.middleware import AuthAndBodyLimitMiddleware

KEY = "a-key-of-the-test"
RIGHT = {"Authorization": f"Bearer {KEY}"}


class Inside:
    """An application that notes what it hears."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        message = await receive()
        self.bodies.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


@pytest.fixture
def inside():
    return Inside()


def client(inside, root_path="", **options):
    limits = ServerLimits(max_body_bytes=100, body_timeout=0.2)
    door = AuthAndBodyLimitMiddleware(inside, limits=limits, public_paths=["/health", "/web/"], **options)
    return TestClient(door, root_path=root_path)


def test_a_request_goes_through_whole(inside):
    reply = client(inside).post("/v1/chat/completions", content=b"x" * 100)
    assert reply.text == "fine"
    assert inside.bodies == [b"x" * 100]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_heard(inside, chunked):
    content = (b"x" * 10 for _ in range(11)) if chunked else b"x" * 101
    reply = client(inside).post("/v1/chat/completions", content=content)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert inside.bodies == []


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1", "/", "/healthy", "/webs", "/x/health", "//v1"]
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}x"}])
def test_without_a_key_nothing_is_heard(inside, path, headers):
    reply = client(inside, api_keys=ApiKeys([KEY])).post(path, content=b"x" * 101, headers=headers)
    assert reply.status_code == 401  # not 413: of the body nothing was asked
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in reply.text
    assert inside.bodies == []


def test_with_the_key_it_is(inside):
    door = client(inside, api_keys=ApiKeys([KEY]))
    assert door.get("/v1/models", headers=RIGHT).text == "fine"


@pytest.mark.parametrize("path", ["/health", "/web", "/web/upload"])
def test_free_paths_need_no_key_and_have_their_own_limits(inside, path):
    door = client(inside, api_keys=ApiKeys([KEY]))
    assert door.post(path, content=b"x" * 1000).text == "fine"


def test_free_paths_behind_a_proxy(inside):
    door = client(inside, "/owl", api_keys=ApiKeys([KEY]))
    assert door.get("/owl/health").text == "fine"
    assert door.get("/owl/v1/models").status_code == 401


def call(door, messages, seconds=5):
    """What the client sees of the door where the messages are `messages`, then silence."""
    sent = []
    waiting = list(messages)

    async def receive():
        if waiting:
            return waiting.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/x", "method": "POST", "headers": []}
    asyncio.run(asyncio.wait_for(door(scope, receive, send), seconds))
    return sent


def test_a_body_that_does_not_come(inside):
    door = AuthAndBodyLimitMiddleware(inside, limits=ServerLimits(body_timeout=0.1))
    sent = call(door, [{"type": "http.request", "body": b"a", "more_body": True}])
    assert sent[0]["status"] == 408
    assert b"body_too_slow" in sent[1]["body"]
    assert inside.bodies == []


def test_a_client_that_leaves_amid_the_body(inside):
    door = AuthAndBodyLimitMiddleware(inside, limits=ServerLimits())
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]
    assert call(door, [*messages, {"type": "http.disconnect"}]) == []
    assert inside.bodies == []


def test_afterwards_the_application_hears_that_the_client_left():
    heard = []

    async def inside(scope, receive, send):
        heard.extend([await receive(), await receive()])

    door = AuthAndBodyLimitMiddleware(inside, limits=ServerLimits())
    parts = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b"},
        {"type": "http.disconnect"},
    ]
    call(door, parts)
    assert heard == [
        {"type": "http.request", "body": b"ab", "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_the_bodies_of_all_requests_together_have_a_limit():
    replies = []
    finish = asyncio.Event()

    async def inside(scope, receive, send):
        await finish.wait()
        replies.append("fine")

    async def ask(door, size):
        async def receive():
            return {"type": "http.request", "body": b"x" * size}

        async def send(message):
            if message["type"] == "http.response.start":
                replies.append(message["status"])

        await door({"type": "http", "path": "/v1/x", "headers": []}, receive, send)

    async def work():
        door = AuthAndBodyLimitMiddleware(inside, limits=ServerLimits(max_inflight_bytes=100))
        first = asyncio.ensure_future(ask(door, 60))
        await asyncio.sleep(0)
        await ask(door, 41)
        second = asyncio.ensure_future(ask(door, 40))
        await asyncio.sleep(0)
        finish.set()
        await asyncio.gather(first, second)
        await ask(door, 100)  # all room is free again

    asyncio.run(work())
    assert replies == [429, "fine", "fine", "fine"]


def test_what_is_no_request_goes_through(inside):
    async def nothing(*_):
        raise AssertionError("nobody is to be asked")

    door = AuthAndBodyLimitMiddleware(inside, limits=ServerLimits(), api_keys=ApiKeys([KEY]))
    asyncio.run(door({"type": "lifespan"}, nothing, nothing))
