"""Attacks on the page: gradio's routes, sessions of other visitors, files, uploads, the log."""

import asyncio
import json
import logging
import os
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import gradio
import httpx
import pytest

from owl2.serve.app import build_app
from owl2.serve.config import MIB, ServerLimits
from owl2.serve.web.exchange import PageExchange
from owl2.serve.web.gateway import ROUTES
from owl2.serve.web.mount import mount
from owl2.serve.web.page import MAX_SESSIONS
from tests.serve.running import FakeEngine, run_app, wait_until

LIMITS = ServerLimits(
    max_images=4, max_image_bytes=MIB, max_upload_bytes=6 * MIB, max_client_upload_bytes=4 * MIB
)
API = "/web/gradio_api"
FORM = "multipart/form-data; boundary=b"
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
def server(tiny_engine):
    """The URL of a server with the page, its app, and its engine."""
    engine = FakeEngine(tiny_engine)
    app = build_app(engine, "tiny", LIMITS, allowed_hosts=["example.com"])
    mount(app, engine, LIMITS)
    with run_app(app) as url:
        yield url, app, engine


@pytest.fixture
def visit(server):
    """Opens the page as a new visitor."""
    clients = []

    def visit():
        clients.append(httpx.Client(base_url=server[0], timeout=20))
        assert clients[-1].get("/web/").status_code == 200
        return clients[-1]

    yield visit
    for client in clients:
        client.close()


@pytest.fixture
def uploads(server):
    """Deletes all uploads afterwards, so that tests do not share quotas."""
    yield
    store = server[1].routes[-1].app.uploads
    for directory in store.directory.iterdir():
        store.delete(directory)


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


def code(reply):
    return reply.status_code, reply.json()["error"]["code"]


def upload(client, data=b"image", name="cat.png", **options):
    files = {"files": (name, data, "image/png")}
    return client.post(f"{API}/upload", files=files, **options)


def function_index(client, event):
    dependencies = client.get("/web/config").json()["dependencies"]
    return next(one["id"] for one in dependencies if one["targets"][0][1] == event)


def join(client, session, text="what?", path=None, event="submit", **fields):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    box = {"text": text, "files": [file] if path else []}
    body = {
        "data": [box, None, [], "en", 8, 0, 1, ""],
        "fn_index": function_index(client, event),
        "session_hash": session,
    }
    content = json.dumps(body | fields)  # httpx cannot encode lone surrogates
    headers = {"Content-Type": "application/json"}
    return client.post(f"{API}/queue/join", content=content, headers=headers)


def last_event(client, session):
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if "process_completed" in line:
                return json.loads(line.removeprefix("data:"))
    return None


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
def test_other_routes_do_not_exist(route, visit):
    method, path = route.split()
    path = re.sub(r"{\w+(:path)?}", "0", path)
    for form in ({"json": {"data": [], "fn_index": 0}}, {"files": {"a": b"b"}}):
        reply = visit().request(method, f"/web{path}", **form if method == "POST" else {})
        assert code(reply) in ((404, "not_found"), (405, "method_not_allowed"))


def test_a_new_route_of_gradio_does_not_exist(server, visit):
    gradio_app = server[1].routes[-1].app.gradio
    gradio_app.get("/gradio_api/new")(lambda: "secret")
    assert code(visit().get(f"{API}/new")) == (404, "not_found")
    gradio_app.router.routes.pop()


@pytest.mark.parametrize(
    "route", ["file=", "file/", "proxy=", "queue/../file=", "file=/", "%66ile="]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_route_fetches_urls(route, method, visit, other_server):
    url, fetched = other_server
    for address in (url, url.replace("http", "HTTP"), url.replace("//", "/"), f"//{url[7:]}"):
        assert visit().request(method, f"{API}/{route}{address}/x.png").status_code == 404
    assert fetched == []


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/logout", "/gradio_api/heartbeat/a"]
)
def test_get_routes_of_the_page_answer_head(path, visit):
    client = visit()
    start = time.monotonic()
    reply = client.head(f"/web{path}")
    assert reply.status_code in (200, 302)
    assert reply.content == b""
    assert time.monotonic() - start < 10  # a stream does not wait for events


# -------------------------------------------------------- files and uploads


def test_files_are_private(visit, uploads):
    owner, other = visit(), visit()
    [path] = upload(owner, b"mine").json()
    url = f"{API}/file={path}"
    assert owner.get(url).content == b"mine"
    assert owner.get(url, headers={"Range": "bytes=1-2"}).content == b"in"
    assert code(other.get(url)) == (404, "not_found")
    other.cookies.clear()
    assert code(other.get(url)) == (404, "not_found")


def test_the_same_content_does_not_reveal_an_upload(visit, uploads):
    """Who has a file cannot find out whether another visitor has uploaded it."""
    owner, other = visit(), visit()
    [path] = upload(owner, b"known").json()
    [second] = upload(other, b"known").json()
    assert path != second
    guess = str(Path(second).parents[2] / Path(path).relative_to(Path(path).parents[2]))
    assert code(other.get(f"{API}/file={guess}")) == (404, "not_found")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "/", __file__, "x" * 9000])
def test_files_of_the_server_do_not_exist(path, visit):
    for address in (path, path.replace("/", "%2f"), f"/{path}", f"{path}%00"):
        assert visit().get(f"{API}/file={address}").status_code == 404


def test_examples_are_readable(visit):
    config = visit().get("/web/config").text
    [path, *_] = re.findall(r'"path": ?"([^"]+\.png)"', config)
    assert visit().get(f"{API}/file={path}").headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    "name, kind, disposition",
    [
        ("a.png", "image/png", "inline"),
        ("a.svg", "application/octet-stream", "attachment"),
        ("a.html", "application/octet-stream", "attachment"),
    ],
)
def test_a_browser_does_not_run_uploads(name, kind, disposition, visit, uploads):
    client = visit()
    [path] = upload(client, b"<script>1</script>", name).json()
    reply = client.get(f"{API}/file={path}")
    assert reply.headers["content-type"] == kind
    assert reply.headers["content-disposition"].startswith(disposition)
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_uploads_need_a_visitor(server):
    for cookie in (None, "", "short", "x" * 44):
        client = httpx.Client(
            base_url=server[0], cookies={"owl2-visitor": cookie} if cookie else {}
        )
        assert code(upload(client)) == (403, "missing_cookie")


def test_uploads_have_quotas(server, visit, uploads, caplog):
    """Another cookie does not give another quota."""
    statuses = []
    for _ in range(8):
        reply = upload(visit(), b"x" * (MIB - 1000))
        statuses.append(reply.status_code)
    assert statuses == [200] * 4 + [429] * 4 or statuses == [200] * 3 + [429] * 5
    assert code(reply) == (429, "upload_quota_exceeded")
    assert int(reply.headers["retry-after"]) > 0
    assert sum("uploads are rejected" in line for line in caplog.messages) == 1
    directory = server[1].routes[-1].app.uploads.directory
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    assert size <= LIMITS.max_client_upload_bytes


def test_small_files_count_with_their_directories(visit, uploads):
    files = [("files", (f"{number}.png", b"x", "image/png")) for number in range(500)]
    reply = visit().post(f"{API}/upload", files=files)
    assert code(reply) == (429, "upload_quota_exceeded")


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"", FORM),
        (b"--b\r\n\r\nx", FORM),
        (b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n', FORM),
        (b"x", "multipart/form-data"),
        (b"x", "text/plain"),
        (b"--b\r\n" + b"a: b\r\n" * 5000, FORM),
    ],
)
def test_invalid_uploads(content, kind, server, visit, uploads):
    reply = visit().post(f"{API}/upload", content=content, headers={"Content-Type": kind})
    assert reply.status_code in (200, 400)
    assert reply.status_code == 400 or reply.json() == []
    assert list(server[1].routes[-1].app.uploads.directory.iterdir()) == []


def test_an_interrupted_upload_is_deleted(server, visit, uploads):
    client = visit()
    address = httpx.URL(server[0])
    head = (
        f"POST {API}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
        f"Cookie: owl2-visitor={client.cookies['owl2-visitor']}\r\nContent-Length: 900000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    directory = server[1].routes[-1].app.uploads.directory
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head.encode() + b"x" * 10_000)
        wait_until(lambda: list(directory.iterdir()))
    wait_until(lambda: not list(directory.iterdir()))


@pytest.mark.anyio
@pytest.mark.parametrize("is_complete", [False, True])
async def test_the_time_of_a_body_is_limited(is_complete):
    messages = [{"type": "http.request", "body": b"x", "more_body": not is_complete}]

    async def receive():
        return messages.pop(0) if messages else await asyncio.sleep(0.1, {"type": "late"})

    exchange = PageExchange(receive, None)
    exchange.limit(10, 0.02, httpx.Headers())
    assert (await exchange.receive())["body"] == b"x"
    assert (await exchange.receive())["type"] == ("late" if is_complete else "http.disconnect")
    rejection = exchange.take_rejection()
    assert (rejection and rejection.status) == (None if is_complete else 408)


def test_no_space_is_an_error_of_the_upload(visit, uploads, monkeypatch):
    async def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("owl2.serve.web.gateway.upload_fn", fail)
    assert code(upload(visit())) == (507, "upload_quota_exceeded")


def test_a_directory_as_a_file_does_not_stop_the_deletion(server, visit, uploads):
    client = visit()
    [path] = upload(client).json()
    for number, directory in enumerate(Path(path).parents):
        join(client, f"s{number}", path=str(directory))
        assert "Files must be uploaded" in str(last_event(client, f"s{number}"))
    page = server[1].routes[-1].app.gradio.get_blocks()
    assert not any(os.path.isdir(file) for files in page.temp_file_sets for file in files)


# ----------------------------------------------------------------- sessions


def test_another_visitor_cannot_use_a_session(server, visit):
    owner, other = visit(), visit()
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
def test_invalid_sessions(session, visit):
    assert code(join(visit(), session)) == (400, "invalid_value")


def test_sessions_are_limited(server):
    assert server[1].routes[-1].app.gradio.state_holder.capacity == MAX_SESSIONS


@pytest.mark.parametrize("path", ["queue/data?session_hash=abc", "heartbeat/abc"])
def test_sessions_need_a_visitor(path, server):
    assert code(httpx.get(f"{server[0]}{API}/{path}")) == (403, "missing_cookie")


# ------------------------------------------------- other websites and hosts


@pytest.mark.parametrize("path", ["upload", "queue/join", "cancel", "login"])
@pytest.mark.parametrize("host", ["localhost", "example.com"])
def test_another_website_cannot_change_anything(path, host, visit):
    headers = {"Origin": "http://other.example", "Host": host}
    url = f"/web/{path}" if path == "login" else f"{API}/{path}"
    for form in ({"files": {"files": b"x"}}, {"json": {}}, {"content": b"{}"}):
        reply = visit().post(url, **form, headers=headers)
        assert code(reply) == (403, "origin_not_allowed")
        assert not any(name.startswith("access-control-") for name in reply.headers)


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://a.example"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_another_website_cannot_read_anything(headers, visit, uploads):
    client = visit()
    [path] = upload(client).json()
    for url in (f"{API}/file={path}", f"{API}/queue/data?session_hash=a", "/web/logout"):
        assert code(client.get(url, headers=headers)) == (403, "origin_not_allowed")
    assert client.get("/web/", headers=headers).status_code == 200  # a link to the page


@pytest.mark.parametrize("path", ["/web/", "/web/config", f"{API}/upload", "/web/login"])
def test_responses_have_no_cors_headers(path, visit):
    """gradio adds them, with credentials, on every host but localhost."""
    headers = {"Host": "example.com", "Origin": "http://example.com"}
    preflight = headers | {"Access-Control-Request-Method": "POST"}
    replies = [visit().get(path, headers=headers), visit().options(path, headers=preflight)]
    for reply in replies:
        assert "access-control-allow-origin" not in reply.headers
        assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("name", ["X-Forwarded-Host", "X-Gradio-Server", "Forwarded"])
def test_headers_of_a_proxy_do_not_change_addresses(name, visit):
    value = {"Forwarded": "host=evil.example"}.get(name, "http://evil.example")
    headers = {name: value if name != "X-Forwarded-Host" else "evil.example"}
    for path in ("/web/", "/web/config", "/web/logout", "/web"):
        reply = visit().get(path, headers=headers)
        assert "evil.example" not in reply.text + str(reply.headers)
    reply = visit().post("/web/login", data={"username": "a", "password": "b"}, headers=headers)
    assert "evil.example" not in str(reply.headers)


@pytest.mark.parametrize("path", ["/web", "/web/", "/web/config", f"{API}/queue/data"])
def test_other_hosts_are_rejected(path, visit):
    """DNS rebinding."""
    for host in ("rebind.example", "127.0.0.1.rebind.example"):
        reply = visit().get(path, headers={"Host": host})
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
def test_invalid_bodies(body, path, visit, capfd, caplog):
    reply = visit().post(f"{API}/{path}", json=body)
    assert 400 <= reply.status_code < 500
    assert "Traceback" not in capfd.readouterr().err + caplog.text


MEMORY = [{"question": "", "files": [{"path": "/etc/passwd"}], "answer": "a", "note": ""}]


def test_visitors_cannot_fill_the_log(visit, capfd, caplog):
    """Each kind of error has one traceback in the log, however often a visitor causes it."""
    client = visit()
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


def test_a_traceback_of_a_bug_is_in_the_log(server, visit, caplog, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("owl2.serve.web.chat_handler.ChatHandler._new_turn", fail)
    client = visit()
    with caplog.at_level(logging.ERROR, "owl2.serve"):
        join(client, "a")
        assert last_event(client, "a")["success"] is False
    assert "a bug" in caplog.text and "Traceback" in caplog.text
