"""Attacks by the page of another website, in a browser that has signed in."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from owl2.serve.app import build_app
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.web.mount import mount
from tests.serve.running import FakeEngine, run_app

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

KEY = "a-secret-key"
# Requests that a browser sends without asking the server first.
ATTACKS = """async (url) => {
    const form = new FormData();
    form.append("files", new File(["evil"], "evil.png"));
    const question = { model: "open", messages: [{ role: "user", content: "evil" }] };
    const event = { data: [null], fn_index: 0, session_hash: "evil" };
    const requests = [
        ["/web/gradio_api/upload", { method: "POST", body: form }],
        ["/web/gradio_api/queue/join", { method: "POST", body: JSON.stringify(event) }],
        ["/v1/chat/completions", { method: "POST", body: JSON.stringify(question) }],
        ["/web/login", { method: "POST", body: new URLSearchParams({ username: "a" }) }],
        ["/web/logout", {}],
    ];
    const readable = [];
    for (const [path, options] of requests) {
        await fetch(url + path, { mode: "no-cors", credentials: "include", ...options });
        const reply = fetch(url + path, { credentials: "include", ...options });
        if (await reply.catch(() => null)) readable.push(path);
    }
    await new Promise((done) => {
        const image = new Image();
        image.onerror = image.onload = done;
        image.src = url + "/web/logout";
    });
    return readable;
}"""
ASK = """async (url) => {
    const headers = { "Content-Type": "application/json", Authorization: "Bearer any" };
    const body = JSON.stringify({ model: "other" });
    const reply = await fetch(url + "/v1/chat/completions", { method: "POST", headers, body });
    return reply.status;
}"""


@pytest.fixture(scope="module")
def website():
    """The URL of another website: another port is another origin, but receives the cookies."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(tiny_engine):
    """Starts a server with the page: its URL, its engine, and the directory of uploads."""
    running = []

    def start(keys=None, **options):
        engine = FakeEngine(tiny_engine)
        app = build_app(engine, "open", api_keys=keys, allowed_hosts=[], **options)
        mount(app, engine, ServerLimits(), keys=keys, **options)
        running.append(run_app(app))
        return running[-1].__enter__(), engine, app.routes[-1].app.uploads.directory

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture
def context(browser):
    context = browser.new_context()
    yield context
    context.close()


def sign_in(context, url):
    """Sign in to the page and wait for it."""
    page = context.new_page()
    page.goto(f"{url}/web/")
    page.locator("input[type=password]").fill(KEY)
    page.keyboard.press("Enter")
    page.locator("#box textarea").wait_for()
    return page


def test_sign_in_and_upload(start, context, images):
    url, _, directory = start(ApiKeys([KEY]))
    page = sign_in(context, url)
    page.set_input_files("#box input[type=file]", [images[0]])
    page.locator("#box .thumbnail-item img").wait_for()
    assert [file.name for file in directory.rglob("*.png")] == [images[0].name]
    page.reload()
    page.locator("#box textarea").wait_for()


@pytest.mark.parametrize("keys", [None, ApiKeys([KEY])], ids=["open", "with a key"])
def test_another_website_changes_and_reads_nothing(start, context, website, keys):
    url, engine, directory = start(keys)
    if keys:
        victim = sign_in(context, url)
    else:
        victim = context.new_page()
        victim.goto(f"{url}/web/")
        victim.locator("#box textarea").wait_for()
    attacker = context.new_page()
    attacker.goto(website)
    assert attacker.evaluate(ATTACKS, url) == []
    assert list(directory.iterdir()) == []
    assert engine.requests == []
    victim.reload()
    victim.locator("#box textarea").wait_for()  # still signed in


def test_allowed_origins(start, context, website):
    url, *_ = start(allowed_origins=[website])
    page = context.new_page()
    page.goto(website)
    assert page.evaluate(ASK, url) == 400  # the status and the body are readable
    other, *_ = start(allowed_origins=["https://example.com"])
    assert (
        page.evaluate(f"(url) => ({ASK})(url).catch((error) => error.name)", other) == "TypeError"
    )


def test_dns_rebinding(start, context):
    """The browser resolves all names below `.example` to this machine."""
    url, *_ = start()
    page = context.new_page()
    for path in ("/web/", "/docs", "/v1/models"):
        assert page.goto(url + path).status == 200
        assert page.goto(url.replace("127.0.0.1", "rebind.example") + path).status == 403
        assert page.goto(url.replace("127.0.0.1", "localhost") + path).status == 200
