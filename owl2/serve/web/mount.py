"""The page in an app: under `/web/`, beside the API."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl2.engine.engine import Engine
from owl2.serve.admission import AdmissionController
from owl2.serve.auth import ApiKeys
from owl2.serve.config import MIB, ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_decoder import SandboxedImageDecoder
from owl2.serve.metrics import Metrics
from owl2.serve.web.examples import Example, drawn
from owl2.serve.web.i18n import TEXTS
from owl2.serve.web.page import HERE, i18n, make_page, theme

PATH = "/web"

# Of a request that brings no images: words and settings.
SAID_BYTES = 2 * MIB
# Of an upload, beside its images: what stands between them.
FORM_BYTES = MIB

# Whatever an answer holds: a browser fetches nothing from elsewhere, and sends nothing there.
# gradio's own scripts are inline and compile templates.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

# A route of gradio's that the page has no use for: it gives a visitor's file to ffmpeg, if the
# machine has one, in this process' own environment; a file can make that open others, and URLs.
SHUT = ("/process_recording",)


def mount(
    app: FastAPI,
    engine: Engine,
    limits: ServerLimits,
    *,
    name: str = "mPLUG-Owl2",
    keys: ApiKeys | None = None,
    examples: Sequence[Example] | None = None,
) -> None:
    """Put the page into an app, at `/web/`, over the same engine and under the same limits.

    It stands at the app's admission (`app.state.admission`), or gives it one.

    Args:
        name: of the model, as the page shows it.
        keys: whoever opens the page must give one of them, as a password.
        examples: to begin with, as `read_examples` gives them; default: drawn ones.

    Raises:
        InputError: a system that cannot decode images safely.
    """
    if not hasattr(app.state, "admission"):
        app.state.admission = AdmissionController(engine, limits, Metrics())
    decoder = SandboxedImageDecoder(limits, engine.processor.image_processor)
    decoder.start()
    if examples is None:
        examples = drawn(Path(os.environ["GRADIO_TEMP_DIR"]))
    gr.mount_gradio_app(
        app,
        make_page(app.state.admission, decoder.decode, name, examples),
        PATH,
        theme=theme(),
        css=(HERE / "page.css").read_text("utf-8"),
        i18n=i18n,
        auth=None if keys is None else _opens(keys),
        auth_message=" ".join(TEXTS["sign_in"]),
        max_file_size=limits.max_image_bytes,
        allowed_paths=[str(file) for example in examples for file in example.images],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    page: Any = app.routes[-1]
    page.app = PageApp(page.app, app.state.admission, limits)


def _opens(keys: ApiKeys) -> Callable[[str, str], bool]:
    def opens(_: str, password: str) -> bool:
        try:
            keys.check(f"Bearer {password}".encode())
        except ApiError:
            return False
        return True

    return opens


class PageApp:
    """gradio's ASGI app, whose replies have `HEADERS`, and whose requests have limits.

    gradio limits each file, not how many; and it reads other bodies whole, before it asks who sends
    them. An upload may be as large as all images of a conversation, anything else `SAID_BYTES`.

    It keeps a connection open for each page that is. When the server ends, these are cancelled;
    they end quietly here, as nothing is wrong then.
    """

    def __init__(self, app: ASGIApp, admission: AdmissionController, limits: ServerLimits) -> None:
        self._app = app
        self._admission = admission
        self._upload_bytes = limits.max_images * limits.max_image_bytes + FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].rstrip("/").endswith(SHUT):
            error = ApiError(404, "The page has no such route.", code="not_found")
            await error.response()(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        body = _Body(receive, self._upload_bytes if is_upload else SAID_BYTES)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > body.most:
            await body.refusal().response()(scope, receive, send)
            return
        has_begun = is_open = False  # its reply; and has not ended

        async def send_on(message: Message) -> None:
            nonlocal has_begun, is_open
            if body.is_too_large and not has_begun:
                return  # whatever gradio makes of half a body
            has_begun = True
            is_open = message.get("more_body", message["type"] == "http.response.start")
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, body.receive, send_on)
        except asyncio.CancelledError:
            if not self._admission.shutting_down:
                raise
            if is_open:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception:  # of any kind: gradio read half a body
            if has_begun or not body.is_too_large:
                raise
        if body.is_too_large and not has_begun:
            await body.refusal().response()(scope, receive, send)


class _Body:
    """A request's body, which ends where it has `most` bytes, as if the client had left."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._size = 0
        self.most = most

    @property
    def is_too_large(self) -> bool:
        return self._size > self.most

    async def receive(self) -> Message:
        if not self.is_too_large:
            message = await self._receive()
            self._size += len(message.get("body", b""))
            if not self.is_too_large:
                return message
        return {"type": "http.disconnect"}

    def refusal(self) -> ApiError:
        return ApiError(
            413,
            f"The request is larger than {self.most:,} bytes, which is this page's limit.",
            code="body_too_large",
        )
