"""The routes beside the chat's, the door around them, and the log."""

import logging
import re
import socket

import httpx
import pytest

from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from tests.serve.running import running, until

ROUTES = ["/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/health", "/metrics"]


def test_the_document_describes_every_route(server_url):
    document = httpx.get(f"{server_url}/openapi.json").json()
    assert sorted(document["paths"]) == sorted(ROUTES)
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= chat["responses"].keys()
    assert "422" not in str(document["paths"])


def test_its_page_is_whole(server_url):
    """It shows every route and every field of a request, and loads nothing from anywhere."""
    page = httpx.get(f"{server_url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    for route in ROUTES:
        assert f"{route}</code>" in page.text
    for field in ("max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "image_url"):
        assert f"<code>{field}</code>" in page.text
    assert "text/event-stream" in page.text
    assert "`" not in page.text
    assert not re.search(r"<script|<link|<img|src=|url\(", page.text)
    for anchor in re.findall(r'href="#([^"]+)"', page.text):
        assert f'id="{anchor}"' in page.text


def test_what_there_is_not(server_url):
    for reply, status in (
        (httpx.get(f"{server_url}/v1/nothing"), 404),
        (httpx.get(f"{server_url}/v1/chat/completions"), 405),
    ):
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_keys_are_asked_where_the_model_is(tiny_engine):
    key = "a-key-of-the-house"
    with running(build_app(tiny_engine, "tiny", api_keys=ApiKeys([key]))) as url:
        for path in ("/health", "/metrics", "/docs", "/openapi.json"):
            assert httpx.get(url + path).status_code == 200, path
        for path in ("/v1/models", "/v1/models/tiny", "/v1/other", "/other"):
            refused = httpx.get(url + path)
            assert refused.status_code == 401, path
            assert refused.json()["error"]["code"] == "invalid_api_key"
            allowed = httpx.get(url + path, headers={"Authorization": f"Bearer {key}"})
            assert allowed.status_code != 401, path


def test_the_log_has_a_line_a_request_and_no_word_of_it(server_url, caplog):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what is this?"}],
        "max_tokens": 2,
    }
    headers = {"Authorization": "Bearer a-key-of-the-house"}
    with caplog.at_level(logging.INFO, "owl2.serve"):
        httpx.post(f"{server_url}/v1/chat/completions?key=abc", json=body, headers=headers)
        httpx.get(f"{server_url}/v1/models/a%0Ab")
        until(lambda: len(caplog.records) == 2)  # written after the reply
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s", lines[0])
    assert not any(word in " ".join(lines) for word in ("what", "house", "abc", "\n"))


def test_who_leaves_before_the_question_is_whole(server_url):
    address = httpx.URL(server_url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
    counted = 'owl2_requests_total{route="none",status="499"} 1.0'
    until(lambda: counted in httpx.get(f"{server_url}/metrics").text)


@pytest.mark.parametrize("number", range(2))
def test_two_apps_count_for_themselves(tiny_engine, number):
    with running(build_app(tiny_engine, "tiny")) as url:
        httpx.get(f"{url}/health")
        metrics = httpx.get(f"{url}/metrics").text
    assert 'owl2_requests_total{route="/health",status="200"} 1.0' in metrics
