"""Attacks on the page: gradio's routes, sessions of other visitors, other websites, the log."""

import json
import logging
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import gradio
import httpx
import pytest

from owl2.serve.admission import current_client
from owl2.serve.web.gateway import ROUTES
from owl2.serve.web.page import MAX_SESSIONS
from tests.serve.running import wait_until
from tests.serve.web.page_requests import API, code, function_index, join, last_event, upload

# All routes of gradio 6.31, with "+" for those that the page has. A route that is not in this list
# does not exist for clients. Check what a new one does before you add it here.
GRADIO_ROUTES = """
+GET / | HEAD / | +GET /assets/{path:path} | +GET /config | GET /config/ | GET /favicon.ico
GET /gradio_api/app_id | GET /gradio_api/app_id/ | POST /gradio_api/api/{api_name}
POST /gradio_api/api/{api_name}/ | GET /gradio_api/call/v2/{api_name}/{event_id}
GET /gradio_api/call/{api_name}/{event_id} | POST /gradio_api/call/v2/{api_name}
POST /gradio_api/call/v2/{api_name}/ | POST /gradio_api/call/{api_name}
POST /gradio_api/call/{api_name}/ | +POST /gradio_api/cancel | POST /gradio_api/component_server
POST /gradio_api/component_server/
GET /gradio_api/custom_component/{id}/{environment}/{type}/{file_name}
GET /gradio_api/deep_link | GET /gradio_api/dev/reload | GET /gradio_api/file/{path:path}
HEAD /gradio_api/file={path_or_url:path} | GET /gradio_api/file={path_or_url:path}
+GET /gradio_api/heartbeat/{session_hash} | GET /gradio_api/info | GET /gradio_api/info/
GET /gradio_api/login_check | GET /gradio_api/login_check/ | GET /gradio_api/openapi.json
POST /gradio_api/process_recording | HEAD /gradio_api/proxy={url_path:path}
GET /gradio_api/proxy={url_path:path} | +GET /gradio_api/queue/data | +POST /gradio_api/queue/join
GET /gradio_api/queue/status | POST /gradio_api/reset | POST /gradio_api/reset/
POST /gradio_api/run/{api_name} | POST /gradio_api/run/{api_name}/ | GET /gradio_api/runs
GET /gradio_api/runs/ | GET /gradio_api/startup-events | POST /gradio_api/stream/{event_id}
POST /gradio_api/stream/{event_id}/close
GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file
GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8
GET /gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}
GET /gradio_api/theme.css | GET /gradio_api/token | GET /gradio_api/token/
POST /gradio_api/undo-vibe-edit | POST /gradio_api/undo-vibe-edit/ | +POST /gradio_api/upload
GET /gradio_api/upload_progress | GET /gradio_api/user | GET /gradio_api/user/
GET /gradio_api/vibe-code | GET /gradio_api/vibe-code/ | POST /gradio_api/vibe-code
POST /gradio_api/vibe-code/ | POST /gradio_api/vibe-edit | POST /gradio_api/vibe-edit/
POST /gradio_api/vibe-starter-queries | POST /gradio_api/vibe-starter-queries/
+POST /login | POST /login/ | +GET /logout | GET /manifest.json | GET /monitoring
GET /monitoring/summary | GET /monitoring/{key} | GET /openapi.json | HEAD /openapi.json
GET /pwa_icon | GET /pwa_icon/{size} | GET /robots.txt | +GET /static/{path:path}
GET /svelte/{path:path} | +GET /theme.css
"""
KNOWN = {route.lstrip("+") for route in re.split(r" \| |\n", GRADIO_ROUTES.strip())}
OPEN = {route[1:] for route in re.split(r" \| |\n", GRADIO_ROUTES.strip()) if route[0] == "+"}


@pytest.fixture(scope="module")
def other_server():
    """The URL of an HTTP server on the loopback interface, and the paths that were requested."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"secret")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------- routes


def routes_of(router):
    for route in router.routes:
        if included := getattr(route, "original_router", None):
            yield from routes_of(included)
        elif getattr(route, "methods", None):
            yield from (f"{method} {route.path}" for method in route.methods)
        else:  # a mounted application
            yield f"MOUNT {route.path}"


def test_every_route_of_gradio_is_known(server):
    gradio_app = server[1].routes[-1].app.gradio
    assert set(routes_of(gradio_app)) == KNOWN, f"gradio {gradio.__version__} has other routes"


def test_only_needed_routes_are_open():
    ours = {f"{method} {path}" for method, path in ROUTES}
    assert ours == OPEN | {"GET /gradio_api/file={path:path}"}


CLOSED = sorted(KNOWN - OPEN - {"HEAD /", "GET /gradio_api/file={path_or_url:path}"})


@pytest.mark.parametrize("route", [route for route in CLOSED if "HEAD" not in route])
def test_other_routes_do_not_exist(route, new_client):
    method, path = route.split()
    path = re.sub(r"{\w+(:path)?}", "0", path)
    for form in ({"json": {"data": [], "fn_index": 0}}, {"files": {"a": b"b"}}):
        reply = new_client().request(method, f"/web{path}", **form if method == "POST" else {})
        assert code(reply) in ((404, "not_found"), (405, "method_not_allowed"))


def test_a_new_route_of_gradio_does_not_exist(server, new_client):
    gradio_app = server[1].routes[-1].app.gradio
    gradio_app.get("/gradio_api/new")(lambda: "secret")
    assert code(new_client().get(f"{API}/new")) == (404, "not_found")
    gradio_app.router.routes.pop()


@pytest.mark.parametrize(
    "route", ["file=", "file/", "proxy=", "queue/../file=", "file=/", "%66ile="]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_route_fetches_urls(route, method, new_client, other_server):
    url, fetched = other_server
    for address in (url, url.replace("http", "HTTP"), url.replace("//", "/"), f"//{url[7:]}"):
        assert new_client().request(method, f"{API}/{route}{address}/x.png").status_code == 404
    assert fetched == []


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/logout", "/gradio_api/heartbeat/a"]
)
def test_get_routes_of_the_page_answer_head(path, new_client):
    client = new_client()
    start = time.monotonic()
    reply = client.head(f"/web{path}")
    assert reply.status_code in (200, 302)
    assert reply.content == b""
    assert time.monotonic() - start < 10  # a stream does not wait for events


# ----------------------------------------------------------------- sessions


def test_another_visitor_cannot_use_a_session(server, new_client):
    owner, other = new_client(), new_client()
    engine = server[2]
    assert join(owner, "secret", "my question").status_code == 200
    wait_until(lambda: engine.requests and "my question" in str(engine.requests[-1].messages))
    request = engine.requests[-1]
    # The other visitor has a session with the same name: it cannot read, ask about or clear this.
    stop = function_index(other, "stop")
    fields = {"data": [None], "fn_index": stop}
    cancel = {"fn_index": stop, "session_hash": "secret", "event_id": "unknown"}
    assert join(other, "secret", **fields).status_code == 200
    assert last_event(other, "secret")["success"]
    assert other.post(f"{API}/cancel", json=cancel).is_success
    assert not request.aborted
    request.emit("a private answer")
    request.end()
    assert "private" in json.dumps(last_event(owner, "secret"))
    join(other, "secret", "what did I ask?")
    wait_until(lambda: "what did I ask?" in str(engine.requests[-1].messages))
    assert "my question" not in str(engine.requests[-1].messages)
    engine.requests[-1].end()
    last_event(other, "secret")


@pytest.mark.parametrize("session", ["", "a.b", "a/b", "x" * 65, "é", None, 1, ["a"], {"a": "b"}])
def test_invalid_sessions(session, new_client):
    assert code(join(new_client(), session)) == (400, "invalid_value")


def test_sessions_are_limited(server):
    assert server[1].routes[-1].app.gradio.state_holder.capacity == MAX_SESSIONS


def test_conversations_from_one_address_are_one_client(server, new_client, monkeypatch):
    """Neither another session nor another cookie gives a second turn in the queue."""
    admission, engine = server[1].state.admission, server[2]
    clients, num_requests, admit = [], len(engine.requests), admission.admit

    def record(*arguments):
        clients.append(current_client.get())
        return admit(*arguments)

    monkeypatch.setattr(admission, "admit", record)
    first, second = new_client(), new_client()
    for client, session in ((first, "a"), (first, "b"), (second, "a")):
        assert join(client, session).status_code == 200
    wait_until(lambda: len(engine.requests) == num_requests + 3)
    for request in engine.requests[num_requests:]:
        request.emit("yes")
        request.end()
    assert last_event(first, "a")["success"]
    assert clients == ["127.0.0.1"] * 3


@pytest.mark.parametrize("path", ["queue/data?session_hash=abc", "heartbeat/abc"])
def test_sessions_need_a_visitor(path, server):
    assert code(httpx.get(f"{server[0]}{API}/{path}")) == (403, "missing_cookie")


# ------------------------------------------------- other websites and hosts


@pytest.mark.parametrize("path", ["upload", "queue/join", "cancel", "login"])
@pytest.mark.parametrize("host", ["localhost", "example.com"])
def test_another_website_cannot_change_anything(path, host, new_client):
    headers = {"Origin": "http://other.example", "Host": host}
    url = f"/web/{path}" if path == "login" else f"{API}/{path}"
    for form in ({"files": {"files": b"x"}}, {"json": {}}, {"content": b"{}"}):
        reply = new_client().post(url, **form, headers=headers)
        assert code(reply) == (403, "origin_not_allowed")
        assert not any(name.startswith("access-control-") for name in reply.headers)


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://a.example"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_another_website_cannot_read_anything(headers, new_client, uploads):
    client = new_client()
    [path] = upload(client).json()
    for url in (f"{API}/file={path}", f"{API}/queue/data?session_hash=a", "/web/logout"):
        assert code(client.get(url, headers=headers)) == (403, "origin_not_allowed")
    assert client.get("/web/", headers=headers).status_code == 200  # a link to the page


@pytest.mark.parametrize("path", ["/web/", "/web/config", f"{API}/upload", "/web/login"])
def test_responses_have_no_cors_headers(path, new_client):
    """gradio adds them, with credentials, on every host but localhost."""
    headers = {"Host": "example.com", "Origin": "http://example.com"}
    preflight = headers | {"Access-Control-Request-Method": "POST"}
    replies = [
        new_client().get(path, headers=headers),
        new_client().options(path, headers=preflight),
    ]
    for reply in replies:
        assert "access-control-allow-origin" not in reply.headers
        assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("name", ["X-Forwarded-Host", "X-Gradio-Server", "Forwarded"])
def test_headers_of_a_proxy_do_not_change_addresses(name, new_client):
    value = {"Forwarded": "host=evil.example"}.get(name, "http://evil.example")
    headers = {name: value if name != "X-Forwarded-Host" else "evil.example"}
    for path in ("/web/", "/web/config", "/web/logout", "/web"):
        reply = new_client().get(path, headers=headers)
        assert "evil.example" not in reply.text + str(reply.headers)
    reply = new_client().post(
        "/web/login", data={"username": "a", "password": "b"}, headers=headers
    )
    assert "evil.example" not in str(reply.headers)


@pytest.mark.parametrize("path", ["/web", "/web/", "/web/config", f"{API}/queue/data"])
def test_other_hosts_are_rejected(path, new_client):
    """DNS rebinding."""
    for host in ("rebind.example", "127.0.0.1.rebind.example"):
        reply = new_client().get(path, headers={"Host": host})
        assert code(reply) == (403, "host_not_allowed")


def test_the_cookie_is_not_available_to_scripts_and_other_sites(server):
    client = httpx.Client(base_url=server[0])
    cookie = client.get("/web/").headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    assert "set-cookie" not in client.get("/web/").headers
    encrypted = httpx.get(f"{server[0]}/web/", headers={"X-Forwarded-Proto": "https"})
    assert "secure" in encrypted.headers["set-cookie"].lower()


# ------------------------------------------------------------------ the log

NESTED = json.loads("[" * 500 + "]" * 500)
BODIES = [
    {"fn_index": 0, "session_hash": "a", "data": [[]] * 9000},
    *({}, [], None, 1, "x", {"fn_index": None}, {"fn_index": "0"}, {"fn_index": [1]}),
    *({"fn_index": 10**9}, {"fn_index": -1}, {"fn_index": True}, {"session_hash": "a"}),
    {"fn_index": 0, "session_hash": "a", "data": None},
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("path", ["queue/join", "cancel"])
def test_invalid_bodies(body, path, new_client, capfd, caplog):
    reply = new_client().post(f"{API}/{path}", json=body)
    assert 400 <= reply.status_code < 500
    assert "Traceback" not in capfd.readouterr().err + caplog.text


MEMORY = [{"question": "", "files": [{"path": "/etc/passwd"}], "answer": "a", "note": ""}]


def test_visitors_cannot_fill_the_log(new_client, capfd, caplog):
    """Each kind of error has one traceback in the log, however often a visitor causes it."""
    client = new_client()
    example = function_index(client, "example_select")
    data = [None, [], "en", 8, 0, 1, ""]
    invalid = [
        {"data": []},
        {"data": [1]},
        {"data": ["x"] * 8},
        {"data": NESTED},
        {"data": NESTED * 8},
        {"data": [{"text": None, "files": None}, *["x"] * 7]},
        {"data": [{"text": "\ud800", "files": []}, None, [], "en", 8, 0, 1, "\ud800"]},
        {"data": [{"text": "a", "files": ["/etc/passwd"]}, None, [], "en", 8, 0, 1, ""]},
        {"data": [{"text": "a", "files": []}, None, [{"question": 1}], "en", 8, 0, 1, ""]},
        {"data": [{"text": "a", "files": []}, None, MEMORY, "en", 8, 0, 1, ""]},
        {"fn_index": example, "data": data, "event_data": None},
        {"fn_index": example, "data": data, "event_data": {"index": 99}},
        {"fn_index": example, "data": data, "event_data": {"index": "x"}, "trigger_id": 10**9},
    ]
    for repetition in range(5):
        for number, fields in enumerate(invalid):
            session = f"s{repetition}x{number}"
            reply = join(client, session, **fields)
            if reply.is_success:
                assert not (last_event(client, session) or {}).get("success")
        client.get(f"{API}/queue/data", params={"session_hash": f"unknown{repetition}"})
        client.get("/web/static/%00")
        client.get("/web/static/" + "x" * 5000)
        client.get("/web/assets/..%2f..%2f")
    captured = capfd.readouterr()
    log = captured.out + captured.err + caplog.text
    assert log.count("Traceback (most recent call last)") <= 2 * len(invalid)
    assert client.get("/web/").status_code == 200


def test_a_traceback_of_a_bug_is_in_the_log(server, new_client, caplog, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("owl2.serve.web.chat_handler.ChatHandler._new_turn", fail)
    client = new_client()
    with caplog.at_level(logging.ERROR, "owl2.serve"):
        join(client, "a")
        assert last_event(client, "a")["success"] is False
    assert "a bug" in caplog.text and "Traceback" in caplog.text
