"""The page in an app: what a browser is given, and who may open it; without a browser."""

import os
import re
from pathlib import Path

import httpx
import pytest

from owl2.serve.app import Settings, make_app
from owl2.serve.keys import Keys
from owl2.serve.limits import Limits
from owl2.serve.web import mount
from tests.serve.running import ToldEngine, running

KEY = "a-key-of-the-house"
LIMITS = Limits(picture_bytes=2000)


@pytest.fixture(scope="module")
def page(tiny_engine):
    """The URL of an app with the page, and the app."""
    engine = ToldEngine(tiny_engine)
    app = make_app(engine, Settings("tiny", LIMITS))
    mount(app, engine, LIMITS, name="<tiny>")
    with running(app) as url:
        yield url, app


@pytest.fixture(scope="module")
def closed(tiny_engine):
    """The URL of one that asks for a key."""
    engine = ToldEngine(tiny_engine)
    keys = Keys([KEY])
    app = make_app(engine, Settings("tiny", LIMITS, keys))
    mount(app, engine, LIMITS, keys=keys)
    with running(app) as url:
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


def test_pictures_have_a_folder_that_is_this_process_own(page):
    [path] = upload(page[0], b"x" * 100).json()
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert Path(path).is_relative_to(folder)
    assert folder.stat().st_mode & 0o077 == 0  # nobody else reads what a visitor showed


def test_an_upload_has_the_apis_limit(page):
    assert upload(page[0], b"x" * 2000).status_code == 200
    assert upload(page[0], b"x" * 2001).status_code == 413


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", str(Path(__file__))])
def test_no_file_of_the_server_is_given(page, path):
    assert httpx.get(f"{page[0]}/web/gradio_api/file={path}").status_code in (403, 404)


def test_no_function_of_the_page_is_an_api(page):
    info = httpx.get(f"{page[0]}/web/gradio_api/info").json()
    assert info["named_endpoints"] == {}


def test_the_page_stands_at_the_apps_desk(page):
    config = httpx.get(f"{page[0]}/web/config").json()
    sliders = [part["props"] for part in config["components"] if part["type"] == "slider"]
    assert sliders[0]["maximum"] == min(LIMITS.answer_tokens, page[1].state.desk.engine.context)


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
    mount(app, ToldEngine(tiny_engine), LIMITS)
    assert app.state.desk.limits is LIMITS
