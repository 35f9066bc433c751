"""The page in an app: what a browser is given, and who may open it; without a browser."""

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

KEY = "a-key-of-the-house"
LIMITS = ServerLimits(max_image_bytes=2000)
OTHER_FIELDS = {"language": "en", "slider": 8}


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
    """The URL of one that asks for a key."""
    engine = FakeEngine(tiny_engine)
    keys = ApiKeys([KEY])
    app = build_app(engine, "tiny", LIMITS, keys)
    mount(app, engine, LIMITS, keys=keys)
    with run_app(app) as url:
        yield url


def upload(url, data, client=httpx):
    files = {"files": ("cat.png", data, "image/png")}
    return client.post(f"{url}/web/gradio_api/upload", files=files)


def test_the_page_is_there_with_the_models_name(page):
    reply = httpx.get(f"{page[0]}/web", follow_redirects=True)
    assert reply.status_code == 200
    assert "owl2 · &lt;tiny&gt;" in reply.text
    assert "<tiny>" not in reply.text.replace("\\u003c", "")


def test_the_api_is_still_there(page):
    assert httpx.get(f"{page[0]}/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_browser_is_told_to_fetch_nothing_from_elsewhere(page):
    policy = httpx.get(f"{page[0]}/web/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'self'"
    assert not re.search(r"https?:|\*", policy)
    theme = httpx.get(f"{page[0]}/web/theme.css")
    assert "content-security-policy" in theme.headers
    assert "@import" not in theme.text
    sources = re.findall(r"url\(['\"]?([^'\")]*)", theme.text)
    assert sources and all(source.startswith(("data:", "static/")) for source in sources)


def test_nothing_is_reported_to_anyone(page):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    config = httpx.get(f"{page[0]}/web/config").json()
    assert config["analytics_enabled"] is False


def test_images_have_a_folder_that_is_this_process_own(page):
    [path] = upload(page[0], b"x" * 100).json()
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert Path(path).is_relative_to(folder)
    assert folder.stat().st_mode & 0o077 == 0  # nobody else reads what a visitor showed


def test_an_upload_has_the_apis_limit(page):
    assert upload(page[0], b"x" * 2000).status_code == 200
    assert upload(page[0], b"x" * 2001).status_code == 413


def test_uploads_have_a_limit_together(page):
    one = ("files", ("cat.png", b"x" * 2000, "image/png"))
    url = f"{page[0]}/web/gradio_api/upload"
    assert httpx.post(url, files=[one] * 8).status_code == 200
    assert httpx.post(url, files=[one] * 600).status_code == 413


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("path", ["gradio_api/queue/join", "gradio_api/cancel", "login"])
def test_no_body_is_read_without_end(closed, path, is_chunked):
    # Of a form it is six fields: starlette itself ends a field of 1 MiB.
    pieces = [b'{"data": ["', *[b"a" * 2**19 + b"&"] * 6, b'"]}']
    content = iter(pieces) if is_chunked else b"".join(pieces)
    kind = "application/x-www-form-urlencoded" if path == "login" else "application/json"
    with httpx.Client(base_url=closed) as client:
        reply = client.post(f"/web/{path}", content=content, headers={"Content-Type": kind})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert httpx.get(f"{closed}/web/").status_code == 200


def answer_about(path, url, name):
    """What comes of a question whose file, in the box or another field, is at that path."""
    config = httpx.get(f"{url}/web/config").json()
    [ask] = [one for one in config["dependencies"] if one["targets"][0][1:] == ["submit"]]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    box = {"text": "what?", "files": [file] if name == "box" else []}
    language, slider = (file if name == other else good for other, good in OTHER_FIELDS.items())
    data = [box, None, language, slider, 0, 1, ""]
    asked = {"data": data, "fn_index": ask["id"], "session_hash": name}
    api = f"{url}/web/gradio_api/queue"
    assert httpx.post(f"{api}/join", json=asked).status_code == 200
    with httpx.stream("GET", f"{api}/data", params={"session_hash": name}) as reply:
        [end] = [line for line in reply.iter_lines() if "process_completed" in line]
    return end


@pytest.mark.parametrize("name", ["box", *OTHER_FIELDS])
def test_a_url_in_the_place_of_a_file_is_not_fetched(page, name, monkeypatch):
    fetched = []

    async def fetch(url, folder):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    assert "Files must be uploaded" in answer_about("http://example.com/cat.png", page[0], name)
    assert fetched == []


@pytest.mark.parametrize("name", ["box", *OTHER_FIELDS])
def test_a_path_of_the_server_is_no_upload(page, name, tmp_path):
    # What gradio takes for a file it copies to where visitors get theirs, and names the copy.
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"nobody's business")
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    by_a_detour = os.path.join(folder, os.path.relpath(secret, folder))
    for path in (str(secret), by_a_detour, str(folder), f"{folder}x/a.png"):
        assert "Files must be uploaded" in answer_about(path, page[0], name)
    assert not list(folder.rglob("secret.png"))


def test_an_upload_is_taken(page):
    [path] = upload(page[0], b"x").json()
    end = json.loads(answer_about(path, page[0], "box").removeprefix("data:"))
    assert end["success"]
    assert end["output"]["data"][0]["value"]["files"][0]["path"] == path  # it was no image


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", str(Path(__file__))])
def test_no_file_of_the_server_is_given(page, path):
    assert httpx.get(f"{page[0]}/web/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize("end", ["", "/"])
def test_no_film_is_given_to_ffmpeg(page, end):
    film = {"video": ("a.mp4", b"#EXTM3U", "video/mp4")}
    url = f"{page[0]}/web/gradio_api/process_recording{end}"
    reply = httpx.post(url, files=film, follow_redirects=True)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_no_function_of_the_page_is_an_api(page):
    info = httpx.get(f"{page[0]}/web/gradio_api/info").json()
    assert info["named_endpoints"] == {}


def test_the_page_stands_at_the_apps_desk(page):
    config = httpx.get(f"{page[0]}/web/config").json()
    sliders = [part["props"] for part in config["components"] if part["type"] == "slider"]
    assert sliders[0]["maximum"] == min(
        LIMITS.max_completion_tokens, page[1].state.admission.engine.context_length
    )


def test_with_keys_nothing_opens_without_one(closed):
    config = httpx.get(f"{closed}/web/config")
    assert config.status_code == 401
    assert upload(closed, b"x").status_code == 401
    assert '"auth_required":true' in httpx.get(f"{closed}/web/").text.replace(" ", "")


@pytest.mark.parametrize("password", ["", "wrong", KEY[:-1], f"Bearer {KEY}"])
def test_a_wrong_key_does_not_open(closed, password):
    form = {"username": "me", "password": password}
    assert httpx.post(f"{closed}/web/login", data=form).status_code in (400, 422)


def test_a_key_opens_whatever_the_name(closed):
    with httpx.Client() as client:
        form = {"username": "anyone", "password": KEY}
        assert client.post(f"{closed}/web/login", data=form).status_code == 200
        assert client.get(f"{closed}/web/config").status_code == 200
        assert upload(closed, b"x", client).status_code == 200


def test_without_an_app_of_ours_it_brings_its_own_desk(tiny_engine):
    from fastapi import FastAPI

    app = FastAPI()
    mount(app, FakeEngine(tiny_engine), LIMITS)
    assert app.state.admission.limits is LIMITS
