"""The mounted page: headers, uploads, blocked routes and sign-in, without a browser."""

import json
import os
import re
from pathlib import Path

import httpx
import pytest

from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.web.mount import mount
from tests.serve.running import FakeEngine, run_app

KEY = "an-api-key"
LIMITS = ServerLimits(max_image_bytes=2000, max_video_bytes=2000)
OTHER_FIELDS = {"memory": [], "language": "en", "slider": 8}


@pytest.fixture(scope="module")
def page(tiny_engine):
    """The URL of an app with the page, and the app."""
    engine = FakeEngine(tiny_engine)
    app = build_app(engine, "tiny", LIMITS)
    mount(app, engine, LIMITS, name="<tiny>")
    with run_app(app) as url:
        yield url, app


@pytest.fixture(scope="module")
def closed(tiny_engine):
    """The URL of an app that requires a key."""
    engine = FakeEngine(tiny_engine)
    keys = ApiKeys([KEY])
    app = build_app(engine, "tiny", LIMITS, keys)
    mount(app, engine, LIMITS, keys=keys)
    with run_app(app) as url:
        yield url


def visitor(url):
    """A client that has opened the page and has its cookie."""
    client = httpx.Client(base_url=url)
    assert client.get("/web/").status_code == 200
    return client


def upload(client, data):
    files = {"files": ("cat.png", data, "image/png")}
    return client.post("/web/gradio_api/upload", files=files)


def test_page_shows_the_model_name(page):
    reply = httpx.get(f"{page[0]}/web", follow_redirects=True)
    assert reply.status_code == 200
    assert "owl2 · &lt;tiny&gt;" in reply.text
    assert "<tiny>" not in reply.text.replace("\\u003c", "")


def test_api_remains_available(page):
    assert httpx.get(f"{page[0]}/v1/models").json()["data"][0]["id"] == "tiny"


def test_content_security_policy_allows_this_server_only(page):
    policy = httpx.get(f"{page[0]}/web/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'self'"
    assert not re.search(r"https?:|\*", policy)
    theme = httpx.get(f"{page[0]}/web/theme.css")
    assert "content-security-policy" in theme.headers
    assert "@import" not in theme.text
    sources = re.findall(r"url\(['\"]?([^'\")]*)", theme.text)
    assert sources and all(source.startswith(("data:", "static/")) for source in sources)


def test_analytics_are_disabled(page):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    config = httpx.get(f"{page[0]}/web/config").json()
    assert config["analytics_enabled"] is False


def test_upload_directory_is_private(page):
    [path] = upload(visitor(page[0]), b"x" * 100).json()
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert Path(path).is_relative_to(folder)
    assert folder.stat().st_mode & 0o077 == 0  # readable by this user only


def test_upload_has_the_size_limit_of_the_api(page):
    client = visitor(page[0])
    assert upload(client, b"x" * 2000).status_code == 200
    assert upload(client, b"x" * 2001).status_code == 413


def test_uploads_have_a_total_size_limit(page):
    one = ("files", ("cat.png", b"x" * 2000, "image/png"))
    client = visitor(page[0])
    for count, status in ((8, 200), (600, 413)):
        reply = client.post("/web/gradio_api/upload", files=[one] * count)
        assert reply.status_code == status


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("path", ["gradio_api/queue/join", "gradio_api/cancel", "login"])
def test_request_bodies_are_limited(closed, path, is_chunked):
    # A form with six fields, because starlette limits a field to 1 MiB.
    chunks = [b'{"data": ["', *[b"a" * 2**19 + b"&"] * 6, b'"]}']
    content = iter(chunks) if is_chunked else b"".join(chunks)
    kind = "application/x-www-form-urlencoded" if path == "login" else "application/json"
    with httpx.Client(base_url=closed) as client:
        reply = client.post(f"/web/{path}", content=content, headers={"Content-Type": kind})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert httpx.get(f"{closed}/web/").status_code == 200


def answer_about(path, client, name):
    """The result of a question with the file `path`, in the text box or in another field."""
    config = client.get("/web/config").json()
    [ask] = [one for one in config["dependencies"] if one["targets"][0][1:] == ["submit"]]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    box = {"text": "what?", "files": [file] if name == "box" else []}
    others = (file if name == other else good for other, good in OTHER_FIELDS.items())
    memory, language, slider = others
    data = [box, None, memory, language, slider, 0, 1, ""]
    request = {"data": data, "fn_index": ask["id"], "session_hash": name}
    api = "/web/gradio_api/queue"
    assert client.post(f"{api}/join", json=request).status_code == 200
    with client.stream("GET", f"{api}/data", params={"session_hash": name}) as reply:
        [end] = [line for line in reply.iter_lines() if "process_completed" in line]
    return end


@pytest.mark.parametrize("name", ["box", *OTHER_FIELDS])
def test_a_url_as_a_file_is_not_fetched(page, name, monkeypatch):
    fetched = []

    async def fetch(url, folder):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    assert "Files must be uploaded" in answer_about(
        "http://example.com/cat.png", visitor(page[0]), name
    )
    assert fetched == []


@pytest.mark.parametrize("name", ["box", *OTHER_FIELDS])
def test_a_path_of_the_server_is_rejected(page, name, tmp_path):
    # gradio would copy the file to the directory of uploads and return the path of the copy.
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    by_a_detour = os.path.join(folder, os.path.relpath(secret, folder))
    client = visitor(page[0])
    [path] = upload(client, b"mine").json()
    [theirs] = upload(visitor(page[0]), b"theirs").json()
    directories = map(str, Path(path).parents)
    for path in (str(secret), by_a_detour, *directories, f"{folder}x/a.png", theirs):
        assert "Files must be uploaded" in answer_about(path, client, name)
    assert not list(folder.rglob("secret.png"))


def test_an_upload_is_accepted(page):
    client = visitor(page[0])
    [path] = upload(client, b"x").json()
    end = json.loads(answer_about(path, client, "box").removeprefix("data:"))
    assert end["success"]
    assert (
        end["output"]["data"][0]["value"]["files"][0]["path"] == path
    )  # returned because it is not an image


def test_page_uses_the_admission_controller_of_the_app(page):
    config = httpx.get(f"{page[0]}/web/config").json()
    sliders = [part["props"] for part in config["components"] if part["type"] == "slider"]
    assert sliders[0]["maximum"] == min(
        LIMITS.max_completion_tokens, page[1].state.admission.engine.context_length
    )


def test_sign_in_is_required_with_keys(closed):
    config = httpx.get(f"{closed}/web/config")
    assert config.status_code == 401
    assert upload(visitor(closed), b"x").status_code == 401
    login = httpx.get(f"{closed}/web/")
    assert login.headers["cache-control"] == "no-store"
    assert 'autocomplete="current-password"' in login.text
    assert "gradio" not in login.text


@pytest.mark.parametrize("password", ["", "wrong", KEY[:-1], f"Bearer {KEY}"])
def test_a_wrong_key_is_rejected(closed, password):
    form = {"username": "me", "password": password}
    assert httpx.post(f"{closed}/web/login", data=form).status_code in (400, 422)


def test_a_key_is_accepted_with_any_user_name(closed):
    client = visitor(closed)
    form = {"username": "anyone", "password": KEY}
    assert client.post("/web/login", data=form).status_code == 200
    assert client.get("/web/config").status_code == 200
    [path] = upload(client, b"x").json()
    assert client.get(f"/web/gradio_api/file={path}").content == b"x"
    client.get("/web/logout", follow_redirects=True)
    assert client.get(f"/web/gradio_api/file={path}").status_code == 401


def test_mount_creates_an_admission_controller(tiny_engine):
    from fastapi import FastAPI

    app = FastAPI()
    mount(app, FakeEngine(tiny_engine), LIMITS)
    assert app.state.admission.limits == LIMITS.with_frames(8)
