"""Bodies with many JSON values: rejected before they are parsed, without blocking the server."""

import json
import threading
import time

import httpx
import pytest

from owl2.serve.errors import ApiError
from owl2.serve.json_body import MAX_VALUES, check_values

MANY = MAX_VALUES + 1
START = b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "x": '


def keys(count):
    return b"{" + b", ".join(b'"%d": 1' % number for number in range(count)) + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"0," * MANY,
        b"[" * MANY,
        b'{"a":' * MANY,
        b"[" + b"[]," * MANY,
        b"[" + b"{}," * MANY,
        b"[" + b'"",' * MANY,
        b"[" + b'",\\"[",' * MANY,
        keys(MANY // 2 + 1),
        b'["x"' + b",0" * MANY,
        b'["\\""' + b",0" * MANY,
        b'["\\\\"' + b",0" * MANY,
        b"[" + b"\n0\n," * MANY,
        b'["' + b"," * MANY + b'"' + b'""' * MANY,  # invalid, but each quote takes time
        *(('["\u2200"' + ",0" * MANY + "]").encode(f"utf-{name}") for name in ("16-le", "32-be")),
    ],
)
def test_too_many_values(body):
    with pytest.raises(ApiError) as caught:
        check_values(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" + b"0," * (MAX_VALUES - 2) + b"0]",
        json.dumps({"a": ",:[{" * MANY}).encode(),
        json.dumps({"a": '",' * MANY}).encode(),
        json.dumps({"a": "\\," * MANY}).encode(),
        json.dumps({"a": '\\",' * MANY}).encode(),
        b'"' + b"," * MANY,
        b'"' + b"," * MANY + b"\\",
    ],
)
def test_characters_in_strings_are_not_counted(body):
    check_values(body)


@pytest.mark.parametrize(
    "value", [b"[" + b"[]," * 10_000_000 + b"0]", keys(1_000_000), b'"' + b",:" * 4_000_000 + b'"']
)
def test_health_responds_while_a_large_body_is_checked(server_url, value):
    body = START + value + b"}"
    replies, seconds = [], []

    def post():
        headers = {"Content-Type": "application/json"}
        url = f"{server_url}/v1/chat/completions"
        replies.append(httpx.post(url, content=body, headers=headers, timeout=60))

    thread = threading.Thread(target=post)
    with httpx.Client() as client:
        client.get(f"{server_url}/health")
        thread.start()
        while thread.is_alive():
            begin = time.thread_time(), time.monotonic()
            assert client.get(f"{server_url}/health").status_code == 200
            seconds.append(time.monotonic() - begin[1])
    thread.join()
    is_valid = value.startswith(b'"')
    assert replies[0].status_code == (200 if is_valid else 400)
    if not is_valid:
        assert replies[0].json()["error"]["code"] == "invalid_json"
    assert max(seconds) < 1  # before: 3 to 28 seconds


def test_large_body_with_one_string_is_accepted(server_url):
    text = "a, [b]: {c} " * 20_000
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "user": text}
    reply = httpx.post(f"{server_url}/v1/chat/completions", json=body | {"max_tokens": 1})
    assert reply.status_code == 200


@pytest.mark.parametrize("size", [10, 100_000])
def test_invalid_json_has_the_same_error_in_every_size(server_url, size):
    reply = httpx.post(
        f"{server_url}/v1/chat/completions",
        content=b'{"a": "' + b"x" * size,
        headers={"Content-Type": "application/json"},
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")
