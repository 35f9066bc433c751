"""Hosts and origins: DNS rebinding, requests of other websites, CORS, HEAD, ambiguous bodies."""

import socket

import httpx
import pytest
from starlette.datastructures import Headers

from owl2.errors import ErrorCode
from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from owl2.serve.errors import ApiError
from owl2.serve.origins import (
    check_host,
    check_origin,
    client_network,
    parse_hosts,
    parse_origins,
)
from tests.errors import raises_input_error
from tests.serve.running import FakeEngine, run_app

OTHER = "http://other.example"
APP = "https://app.example"
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": ""}]}


@pytest.fixture(scope="module")
def server(tiny_engine):
    """The URL of a server that accepts localhost only, and the pages of one other website."""
    app = build_app(FakeEngine(tiny_engine), "tiny", allowed_hosts=[], allowed_origins=[APP])
    with run_app(app) as url:
        yield url


def code(reply):
    return reply.status_code, reply.json()["error"]["code"]


def rejection(check, headers, *arguments):
    try:
        check(Headers(headers), *arguments)
    except ApiError as error:
        return error.status, error.code
    return None


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "[::1]", "app.localhost:8000"),
        # DNS cannot redirect addresses. Kubernetes and Prometheus use them.
        *("10.0.0.1:8000", "0.0.0.0", "[::2]"),
        # Containers on this machine
        *("host.docker.internal:8000", "host.containers.internal"),
    ],
)
def test_hosts_that_dns_cannot_redirect_are_accepted(host):
    assert rejection(check_host, {"host": host}, []) is None
    assert rejection(check_host, {"host": host}, ["example.com"]) is None


@pytest.mark.parametrize(
    "host",
    [
        *("rebind.example", "localhost.example", "127.0.0.1.example", "2130706433", "127.1"),
        *("me@localhost", "localhost/x", "localhost:x", "", "xlocalhost", "[::1", "x.internal"),
    ],
)
def test_other_hosts_are_rejected(host, server):
    assert rejection(check_host, {"host": host}, []) == (403, "host_not_allowed")
    assert rejection(check_host, {"host": host}, None) is None
    for path in ("/health", "/docs", "/v1/models", "/unknown"):
        reply = httpx.get(server + path, headers={"Host": host})
        assert code(reply) == (403, "host_not_allowed")


def test_programs_without_the_header_are_accepted():
    assert rejection(check_host, {}, []) is None
    assert rejection(check_origin, {"host": "localhost"}) is None


@pytest.mark.parametrize(
    "client, network",
    [
        (("192.0.2.1", 5), "192.0.2.1"),
        (("2001:db8::2:3", 5, 0, 0), "2001:db8::/64"),
        (("::1", 5, 0, 0), "::/64"),
        (("fe80::1%eth0", 5), "fe80::/64"),
        (None, ""),
    ],
)
def test_addresses_of_an_ipv6_network_are_one_client(client, network):
    assert client_network(client) == network


def test_allowed_hosts():
    hosts = parse_hosts("example.com, *.Example.org,[fd00::1],10.0.0.1")
    assert hosts == ["example.com", "*.example.org", "[fd00::1]", "10.0.0.1"]
    for host in ("example.com:443", "EXAMPLE.com", "a.b.example.org", "[fd00::1]:8", "10.0.0.1"):
        assert rejection(check_host, {"host": host}, hosts) is None
    for host in ("a.example.com", "example.org", "xexample.org", "example.com.evil"):
        assert rejection(check_host, {"host": host}, hosts) == (403, "host_not_allowed")
    assert rejection(check_host, {"host": "any.example"}, parse_hosts("*")) is None


def test_forwarded_host_replaces_the_host_if_it_is_listed(tiny_engine):
    hosts = ["*.app.example"]
    with run_app(build_app(FakeEngine(tiny_engine), "tiny", allowed_hosts=hosts)) as url:
        for name, expected in (("x.app.example", "x.app.example"), ("evil.example", "127.0.0.1")):
            headers = {"X-Forwarded-Host": name, "Origin": f"http://{name}"}
            reply = httpx.get(f"{url}/health/", headers=headers)  # redirects
            assert httpx.URL(reply.headers["location"]).host == expected
            reply = httpx.post(f"{url}/v1/chat/completions", json={}, headers=headers)
            assert reply.status_code == (400 if name == expected else 403)
        # DNS rebinding: the page can set the header, but not its host.
        headers = {"Host": "rebind.example", "X-Forwarded-Host": "x.app.example"}
        assert code(httpx.get(f"{url}/health", headers=headers)) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "origin, host",
    [
        ("http://localhost:8000", "localhost:8000"),
        ("https://example.com", "example.com"),
        ("https://example.com", "example.com:443"),
        ("http://Example.com", "example.com"),
        ("http://[::1]:8000", "[::1]:8000"),
        (APP, "localhost:8000"),
    ],
)
def test_accepted_origins(origin, host):
    assert rejection(check_origin, {"origin": origin, "host": host}, [APP]) is None


@pytest.mark.parametrize(
    "origin, host",
    [
        ("http://localhost:3000", "localhost:8000"),
        ("http://127.0.0.1:8000", "localhost:8000"),
        ("https://example.com", "example.com:80"),
        ("https://example.com.evil.example", "example.com"),
        (f"{APP}.evil.example", "localhost"),
        ("http://x:y", "x"),
        ("null", "localhost"),
        ("", ""),
    ],
)
def test_rejected_origins(origin, host):
    headers = {"origin": origin, "host": host}
    assert rejection(check_origin, headers, [APP]) == (403, "origin_not_allowed")


@pytest.mark.parametrize(
    "site, expected",
    [
        ("none", None),
        ("same-origin", None),
        ("same-site", (403, "origin_not_allowed")),
        ("cross-site", (403, "origin_not_allowed")),
    ],
)
def test_relation_of_the_site_without_an_origin(site, expected):
    assert rejection(check_origin, {"sec-fetch-site": site}) == expected


@pytest.mark.parametrize("option", ["https://example.com", "a b", "example.com:8000", "a/b", "*.*"])
def test_invalid_hosts(option):
    with raises_input_error(ErrorCode.INVALID_VALUE, option):
        parse_hosts(option)


def test_origins_of_applications():
    option = "file://, app://obsidian.md,HTTPS://Example.com/, null"
    origins = ["file://", "app://obsidian.md", "https://example.com", "null"]
    assert parse_origins(option) == origins
    for origin in origins:
        assert rejection(check_origin, {"origin": origin, "host": "localhost"}, origins) is None


@pytest.mark.parametrize("option", ["example.com", "https://example.com/path", "HTTPS:example"])
def test_invalid_origins(option):
    with raises_input_error(ErrorCode.INVALID_VALUE, option):
        parse_origins(option)


@pytest.mark.parametrize("content_type", ["text/plain", "application/json"])
def test_another_website_cannot_use_the_api(server, content_type):
    headers = {"Origin": OTHER, "Content-Type": content_type}
    reply = httpx.post(f"{server}/v1/chat/completions", json=QUESTION, headers=headers)
    assert code(reply) == (403, "origin_not_allowed")
    assert not any(name.startswith("access-control-") for name in reply.headers)
    preflight = {"Origin": OTHER, "Access-Control-Request-Method": "POST"}
    reply = httpx.options(f"{server}/v1/chat/completions", headers=preflight)
    assert reply.status_code == 400
    assert "access-control-allow-origin" not in reply.headers
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{server}/v1/models", headers={"Origin": OTHER}).headers
    )


def test_an_allowed_website_can_use_the_api(server, tiny_engine):
    headers = {"Origin": APP}
    reply = httpx.post(f"{server}/v1/chat/completions", json={}, headers=headers)
    assert code(reply) == (400, "missing_required_parameter")  # the body has been read
    assert reply.headers["access-control-allow-origin"] == APP
    assert "access-control-allow-credentials" not in reply.headers
    app = build_app(
        FakeEngine(tiny_engine), "tiny", api_keys=ApiKeys(["a-secret-key"]), allowed_origins=["*"]
    )
    with run_app(app) as url:
        preflight = headers | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        }
        reply = httpx.options(f"{url}/v1/chat/completions", headers=preflight)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "*"
        assert "x-stainless-os" in reply.headers["access-control-allow-headers"]
        reply = httpx.post(f"{url}/v1/chat/completions", json={}, headers=headers)
        assert code(reply) == (401, "invalid_api_key")
        assert reply.headers["access-control-allow-origin"] == "*"  # the page can read the error


PATHS = ("/health", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/models/tiny")


@pytest.mark.parametrize("path", PATHS)
def test_get_routes_answer_head(server, path):
    with httpx.Client() as client:
        reply = client.head(server + path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert int(reply.headers["content-length"]) > 0
        assert client.get(server + path).content  # the connection is still in order


def test_head_requests_are_counted_by_route(server):
    httpx.head(f"{server}/v1/models/tiny")
    counted = 'owl2_requests_total{route="/v1/models/{name:path}",status="200"}'
    assert counted in httpx.get(f"{server}/metrics").text


def test_head_of_other_routes(server):
    assert httpx.head(f"{server}/unknown").status_code == 404
    assert httpx.head(f"{server}/v1/chat/completions").status_code == 405


def raw(url, request):
    """What a server sends until it closes the connection."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/web/login"])
def test_two_lengths_of_a_body_close_the_connection(server, path):
    """Request smuggling: the second request must not be answered."""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    ).encode()
    answer = raw(server, request)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
