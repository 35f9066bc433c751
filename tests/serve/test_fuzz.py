"""Fuzzing: no request causes a 5xx, hangs, or changes the answers to later requests."""

import copy
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from owl2.serve.config import MIB, ServerLimits
from tests.serve.images import data_uri, encode, noise
from tests.serve.running import run_app

SECONDS = 20  # timeout of every response
LIMITS = ServerLimits(
    max_completion_tokens=4,
    max_n=3,
    max_body_bytes=2 * MIB,
    max_image_bytes=MIB,
    max_image_pixels=500_000,
    image_decode_memory=128 * MIB,
)
VALID = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "what is this?"}],
    "max_tokens": 4,
    "temperature": 0,
}
JSON = {"Content-Type": "application/json"}


def bounded(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def image_request(url):
    question = {"type": "text", "text": "what is this?"}
    image = {"type": "image_url", "image_url": {"url": url}}
    return VALID | {"messages": [{"role": "user", "content": [image, question]}]}


FULL = image_request(data_uri(encode(noise()))) | {
    "stream": False,
    "n": 2,
    "seed": 5,
    "top_p": 0.5,
    "stop": ["a", "b"],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [],
    "user": "me",
}


@pytest.fixture(scope="module")
def url(tiny_engine):
    from owl2.serve.app import build_app

    with run_app(build_app(tiny_engine, "tiny", LIMITS)) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        yield http


def answers(reply):
    """Text, finish reason and tokens of each answer.

    The last digits of log-probabilities depend on the other requests of the batch.
    """
    return [
        (
            choice["message"]["content"],
            choice["finish_reason"],
            [scored["token"] for scored in choice["logprobs"]["content"]],
        )
        for choice in reply.json()["choices"]
    ]


@pytest.fixture(scope="module")
def valid_answers(http):
    def valid_answers():
        reply = http.post("/v1/chat/completions", json=FULL)
        assert reply.status_code == 200, reply.text
        return answers(reply)

    return valid_answers


@pytest.fixture(autouse=True, scope="module")
def answers_do_not_change(valid_answers):
    """The same request has the same answers before and after all tests."""
    before = valid_answers()
    yield
    assert valid_answers() == before


def send(http, body):
    """The response to a body: an answer, or an error that the client caused."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = http.post("/v1/chat/completions", content=content, headers=JSON)
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
        assert len(error["message"]) < 1100
    return reply


# ------------------------------------------------------------------ from the OpenAPI document


CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_requests_generated_from_openapi_document(url, mode, examples):
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tried = set()
    for found in document.get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue  # every string is a valid path
        tried.add((operation.method, operation.path))

        @bounded(examples if operation.body else 3)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            body = case.body
            if mode == GenerationMode.POSITIVE and isinstance(body, dict):
                body["model"] = "tiny"  # other names only reach a 404
                if body.get("max_tokens") not in (None, 0):
                    body["max_tokens"] = 4
            case.call_and_validate(checks=CHECKS, timeout=SECONDS)

        check()
    assert ("post", "/v1/chat/completions") in tried
    assert mode == GenerationMode.NEGATIVE or len(tried) >= 5


# ------------------------------------------------------------------ mutated requests

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(10**300), 10**300),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 1e308, -0.0]),
)
STRINGS = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010), max_size=5),
    st.sampled_from(
        ["\0", "\ud83d", "<|image|>", "</s>", "<s>", "USER: ", " ASSISTANT:", "ﷺ" * 99]
    ),
    st.sampled_from(
        ["data:", "data:image/png;base64,", "file:///etc/passwd", "http://[", "a" * 5000]
    ),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda some: st.one_of(st.lists(some, max_size=3), st.dictionaries(STRINGS, some, max_size=3)),
    max_leaves=5,
)


def paths(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths(item, (*path, index))


PATHS = list(paths(FULL))[1:]


def mutate(request, changes):
    request = copy.deepcopy(request)
    for (*parents, key), value in changes:
        container = request
        try:
            for step in parents:
                container = container[step]
            container[key] = value
        except (KeyError, IndexError, TypeError):  # an earlier change removed it
            continue
    return request


@bounded(100)
@given(st.lists(st.tuples(st.sampled_from(PATHS), ANYTHING), min_size=1, max_size=3))
def test_invalid_values_in_any_field(http, changes):
    send(http, mutate(FULL, changes))


@bounded(30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["role", "content"]),
            st.one_of(st.sampled_from(["system", "user", "assistant", "developer"]), STRINGS),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_conversations_with_any_roles_and_content(http, turns):
    messages = [{"role": "user", "content": "a"} | {name: value} for name, value in turns]
    send(http, VALID | {"messages": messages})


@bounded(40)
@given(st.integers(0, len(json.dumps(FULL)) - 1), st.binary(max_size=3))
def test_truncated_json_and_inserted_bytes(http, position, more):
    complete = json.dumps(FULL).encode()
    assert send(http, complete[:position]).status_code == 400
    send(http, complete[:position] + more + complete[position:])


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"messages":' * 100_000,
        b'{"model": "tiny", "messages": ' + b'[{"a":' * 400 + b"1" + b"}]" * 400 + b"}",
        b'{"x": ' + b"[" * 900 + b"]" * 900 + b"," + json.dumps(VALID).encode()[1:],
        b'{"n": ' + b"9" * 1_000_000 + b"}",
        b'{"temperature": 1e999999, ' + json.dumps(VALID).encode()[1:],
        b'{"seed": NaN, "x": -Infinity, ' + json.dumps(VALID).encode()[1:],
        b"\xef\xbb\xbf" + json.dumps(VALID).encode(),
        json.dumps(VALID).encode("utf-16"),
        b"x" * (2 * MIB + 1),
        json.dumps(VALID | {"messages": VALID["messages"] * 30_000}).encode(),
        json.dumps(VALID | {"stop": ["a"] * 100_000}).encode(),
        json.dumps(VALID | {f"field {n}": n for n in range(50_000)}).encode(),
        json.dumps(VALID | {"messages": [{"role": "user", "content": "a " * 500_000}]}).encode(),
        json.dumps(VALID | {"messages": [{"role": "user", "content": "<|image|>" * 9}]}).encode(),
    ],
    ids=lambda body: repr(body[:30]),
)
def test_large_and_nested_bodies(http, body):
    send(http, body)


# ------------------------------------------------------------------ corrupt images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "JPEG2000"])
@bounded(8)
@given(random=st.randoms(use_true_random=False))
def test_corrupt_images(http, kind, random):
    Image.init()
    data = bytearray(encode(noise(), kind))
    for _ in range(random.randrange(1, 30)):
        data[random.randrange(len(data))] = random.randrange(256)
    send(http, image_request(data_uri(bytes(data[: random.randrange(len(data)) or None]))))
    send(http, image_request(data_uri(bytes(data))))


@bounded(40)
@given(st.one_of(STRINGS, st.binary(max_size=200).map(data_uri)))
def test_image_urls(http, url):
    assert send(http, image_request(url)).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        image_request(data_uri(encode(noise())[:100])),
        image_request("file:///etc/passwd"),
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a " * 5000}]},
        {"messages": [{"role": "user", "content": "<|image|>"}]},
        {"max_tokens": 0},
        {"n": 4},
    ],
    ids=["broken", "file", "empty", "no question", "too long", "no image", "tokens", "answers"],
)
def test_rejected_streams_have_a_status(http, change):
    for stream in (False, True):
        assert send(http, VALID | change | {"stream": stream}).status_code == 400


def test_valid_requests_among_invalid_ones(url, valid_answers):
    expected = valid_answers()
    invalid = [
        json.dumps(image_request(data_uri(encode(noise())[:50]))).encode(),
        json.dumps(image_request(data_uri(b"x" * 1000))).encode(),
        json.dumps(image_request(data_uri(encode(noise(size=(2000, 2000)), "JPEG")))).encode(),
        json.dumps(FULL).encode()[:-1],
        b"[" * 100_000,
        b"x" * (2 * MIB + 1),
    ]
    valid = json.dumps(FULL).encode()

    def post(body):
        with httpx.Client(base_url=url, timeout=SECONDS) as http:
            return send(http, body)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(post, [*invalid, valid] * 6))
    for number, reply in enumerate(replies):
        if number % 7 == 6:
            assert answers(reply) == expected
        else:
            assert 400 <= reply.status_code < 500


# ------------------------------------------------------------------ malformed HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9"
        + b"9" * 99
        + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_malformed_http(http, url, data):
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 5) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(0.1)
            assert not connection.recv(1000).startswith(b"HTTP/1.1 5")
        except (TimeoutError, ConnectionError):  # the server waits or has closed the connection
            pass
    assert http.get("/health").status_code == 200
