"""Routes other than chat completions, the documentation, API keys, the log and the metrics."""

import logging
import re
import socket
from html import escape

import httpx
import pytest

from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from tests.serve.running import run_app, wait_until

GENERATING = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
ROUTES = [*GENERATING, "/v1/models", "/v1/models/{name}", "/health", "/metrics"]
KEY = "an-api-key-for-tests"


def test_openapi_document_describes_every_route(server_url):
    document = httpx.get(f"{server_url}/openapi.json").json()
    assert sorted(document["paths"]) == sorted(ROUTES)
    for route in GENERATING:
        statuses = document["paths"][route]["post"]["responses"].keys()
        assert {"200", "400", "401", "404", "413", "429", "503"} <= statuses
    assert "422" not in str(document["paths"])
    assert "securitySchemes" not in document["components"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/chat/completions", "/v1/v1/models", "/"])
def test_unknown_paths_name_the_routes(server_url, path):
    reply = httpx.post(server_url + path, json={})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    for route in ROUTES:
        assert route in reply.json()["error"]["message"]


def test_docs_page_is_complete_and_works_offline(server_url):
    page = httpx.get(f"{server_url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    for route in ROUTES:
        assert f"{escape(route)}</code>" in page.text
    for name in ("max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "image_url"):
        assert f"<td>{name}</td>" in page.text
    assert "text/event-stream" in page.text
    assert not re.search(r"<script|<link|<img|src=|url\(", page.text)


def test_api_keys_protect_all_but_monitoring_and_documentation(tiny_engine):
    with run_app(build_app(tiny_engine, "tiny", api_keys=ApiKeys([KEY]))) as url:
        for path in ("/health", "/metrics", "/docs", "/openapi.json"):
            assert httpx.get(url + path).status_code == 200, path
        document = httpx.get(f"{url}/openapi.json").json()
        [(name, scheme)] = document["components"]["securitySchemes"].items()
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        for path, methods in document["paths"].items():
            for operation in methods.values():
                expected = [{name: []}] if path.startswith("/v1/") else None
                assert operation.get("security") == expected, path
        for path in ("/v1/models", "/v1/models/tiny", "/v1/other", "/other"):
            rejected = httpx.get(url + path)
            assert rejected.status_code == 401, path
            assert rejected.json()["error"]["code"] == "invalid_api_key"
            accepted = httpx.get(url + path, headers={"Authorization": f"Bearer {KEY}"})
            assert accepted.status_code != 401, path


def test_log_has_one_line_per_request_and_no_client_data(server_url, caplog):
    message = {"role": "user", "content": "what is this?"}
    body = {"model": "tiny", "messages": [message], "max_tokens": 2}
    headers = {"Authorization": f"Bearer {KEY}"}
    with caplog.at_level(logging.INFO, "owl2.serve"):
        httpx.post(f"{server_url}/v1/chat/completions?key=abc", json=body, headers=headers)
        httpx.get(f"{server_url}/v1/models/a%0Ab")
        wait_until(lambda: len(caplog.records) == 2)  # written after the response
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s [0-9a-f]{32}", lines[0]
    )
    assert not any(secret in " ".join(lines) for secret in ("what", KEY, "abc", "\n"))


@pytest.mark.parametrize(
    ("given", "is_echoed"),
    [("abc-1.2_3:4", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/other"])
def test_request_id_is_echoed_or_generated(server_url, caplog, path, given, is_echoed):
    with caplog.at_level(logging.INFO, "owl2.serve"):
        reply = httpx.get(server_url + path, headers={"X-Request-ID": given})
        wait_until(lambda: caplog.records)
    [own] = reply.headers.get_list("x-request-id")
    assert (own == given) == is_echoed
    assert is_echoed or re.fullmatch("[0-9a-f]{32}", own)
    assert caplog.records[0].getMessage().endswith(f" {own}")


def test_client_that_disconnects_during_its_request_is_counted(server_url):
    address = httpx.URL(server_url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
    counted = 'owl2_requests_total{route="none",status="499"} 1.0'
    wait_until(lambda: counted in httpx.get(f"{server_url}/metrics").text)


def test_applications_have_separate_metrics(tiny_engine):
    for _ in range(2):
        with run_app(build_app(tiny_engine, "tiny")) as url:
            httpx.get(f"{url}/health")
            metrics = httpx.get(f"{url}/metrics").text
        assert 'owl2_requests_total{route="/health",status="200"} 1.0' in metrics
