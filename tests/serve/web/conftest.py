"""A browser and pages: with an engine that the test controls, and with the tiny model. Visitors
without a browser."""

import shutil
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

# Runs without a sandbox (in containers) and without background network access.
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP *.example 127.0.0.1",
]
TIMEOUT_MS = 20_000


@pytest.fixture
def anyio_backend():
    """Coroutine functions with the mark `anyio` run in asyncio's event loop."""
    return "asyncio"


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail("chromium is not installed; `make test-browser` installs it.")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def controlled_page(tiny_engine):
    """The URL of a page, and its engine, whose answers come from the test."""
    from owl2.serve.app import build_app
    from owl2.serve.config import ServerLimits
    from owl2.serve.web.mount import mount
    from tests.serve.running import FakeEngine, run_app

    engine = FakeEngine(tiny_engine)
    limits = ServerLimits(max_image_bytes=50_000, max_images=4)
    app = build_app(engine, "controlled", limits)
    mount(app, engine, limits, name="controlled")
    with run_app(app) as url:
        yield f"{url}/web/", engine


@pytest.fixture(scope="session")
def tiny(tiny_engine):
    """The URL of a page with the tiny model."""
    from owl2.serve.app import build_app
    from owl2.serve.config import ServerLimits
    from owl2.serve.web.mount import mount
    from tests.serve.running import run_app

    app = build_app(tiny_engine, "tiny")
    mount(app, tiny_engine, ServerLimits(), name="tiny")
    with run_app(app) as url:
        yield f"{url}/web/"


@pytest.fixture
def visit(browser):
    """Opens a URL in a new context. Fails on script errors and on requests to other hosts."""
    problems = []

    def check(request):
        place = urlsplit(request.url)
        if place.scheme not in ("data", "blob") and place.hostname != "127.0.0.1":
            problems.append(request.url)

    with ExitStack() as stack:

        def open_page(url, **settings):
            defaults = {"locale": "en-US", "viewport": {"width": 1000, "height": 800}}
            context = browser.new_context(**defaults | settings)
            stack.callback(context.close)
            context.set_default_timeout(TIMEOUT_MS)
            context.on("request", check)
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(url)
            page.locator("#box textarea").wait_for()
            page.wait_for_function("window.owl2")  # its script has run
            return page

        yield open_page
    assert problems == []


@pytest.fixture
def open_chat(visit, controlled_page):
    """Opens the page whose answers come from the test."""
    from tests.serve.web.browser_page import Page

    url, engine = controlled_page

    def open_page(**settings):
        return Page(visit(url, **settings), engine)

    return open_page


@pytest.fixture
def images(tmp_path):
    """Three image files."""
    files = [tmp_path / f"{name}.png" for name in ("red", "green", "blue")]
    for file in files:
        Image.new("RGB", (40, 30), file.stem).save(file)
    return files


@pytest.fixture
async def new_visitor(tiny_engine):
    """`new_visitor(**settings)` returns a `Visitor`."""
    from tests.serve.running import FakeEngine
    from tests.serve.web.visitor import Visitor

    engine = FakeEngine(tiny_engine)
    visitors = []

    def start(**settings):
        visitors.append(Visitor(engine, **settings))
        return visitors[-1]

    yield start
    for visitor in visitors:
        assert not visitor.conversation.answering.locked()
        assert visitor.admission.in_flight == 0


@pytest.fixture(scope="module")
def server(tiny_engine):
    """The URL of a server with the page, its app, and its engine."""
    from owl2.serve.app import build_app
    from owl2.serve.web.mount import mount
    from tests.serve.running import FakeEngine, run_app
    from tests.serve.web.page_requests import LIMITS

    engine = FakeEngine(tiny_engine)
    app = build_app(engine, "tiny", LIMITS, allowed_hosts=["example.com"])
    mount(app, engine, LIMITS)
    with run_app(app) as url:
        yield url, app, engine


@pytest.fixture
def new_client(server):
    """Opens the page as a new visitor, without a browser."""
    clients = []

    def open_page():
        clients.append(httpx.Client(base_url=server[0], timeout=20))
        assert clients[-1].get("/web/").status_code == 200
        return clients[-1]

    yield open_page
    for client in clients:
        client.close()


@pytest.fixture
def uploads(server):
    """Deletes all uploads afterwards, so that tests do not share quotas."""
    yield
    store = server[1].routes[-1].app.uploads
    for directory in store.directory.iterdir():
        store.delete(directory)
