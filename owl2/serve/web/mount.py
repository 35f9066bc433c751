"""Mount the page in an app, under `/web/`."""

import asyncio
import os
from collections.abc import Sequence
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
from owl2.serve.errors import ApiError, body_too_large
from owl2.serve.image_decoder import SandboxedImageDecoder
from owl2.serve.metrics import Metrics
from owl2.serve.web.examples import Example, draw_examples
from owl2.serve.web.i18n import TEXTS
from owl2.serve.web.page import HERE, Page, i18n, theme

PATH = "/web"

# Limit of a request without images.
MAX_BODY_BYTES = 2 * MIB
# Limit of the parts of an upload that are not images.
MAX_FORM_BYTES = MIB

# The browser exchanges data with this server only, whatever an answer contains. gradio has inline
# scripts and compiles templates, which need 'unsafe-inline' and 'unsafe-eval'.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'self'; form-action 'self'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

# This route of gradio passes an uploaded file to ffmpeg, which can open other files and URLs. The
# page does not use it.
BLOCKED_ROUTES = ("/process_recording",)


def mount(
    app: FastAPI,
    engine: Engine,
    limits: ServerLimits,
    *,
    name: str = "mPLUG-Owl2",
    keys: ApiKeys | None = None,
    examples: Sequence[Example] | None = None,
) -> None:
    """Mount the page at `/web/` of an app, with the same engine and limits.

    It shares `app.state.admission` and `app.state.decoder`, which are created if they do not exist.

    Args:
        name: The model name that the page shows.
        keys: If given, visitors sign in with one of these keys as the password.
        examples: As from `read_examples`; default: `draw_examples`.

    Raises:
        InputError: The system cannot run the sandboxed image decoder.
    """
    if not hasattr(app.state, "admission"):
        app.state.admission = AdmissionController(engine, limits, Metrics())
        app.state.decoder = SandboxedImageDecoder(limits, engine.processor.image_processor)
    app.state.decoder.start()
    if examples is None:
        examples = draw_examples(Path(os.environ["GRADIO_TEMP_DIR"]))
    gr.mount_gradio_app(
        app,
        Page(app.state.admission, app.state.decoder.decode, name, examples),
        PATH,
        theme=theme(),
        css=(HERE / "page.css").read_text("utf-8"),
        i18n=i18n,
        auth=None if keys is None else lambda _, password: keys.is_valid(password),
        auth_message=" ".join(TEXTS["sign_in"].values()),
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
    page.app = PageMiddleware(page.app, app.state.admission)


class PageMiddleware:
    """Adds `HEADERS` to the responses of gradio and limits its request bodies.

    gradio limits the size of each file but not their number, and reads other bodies completely
    before it checks the sign-in. Here an upload may have the size of all images of a conversation,
    any other body `MAX_BODY_BYTES`. A body ends at the limit, as if the client had disconnected.

    gradio keeps a connection open for each page. At shutdown these are cancelled, which is not
    reported as an error.
    """

    def __init__(self, app: ASGIApp, admission: AdmissionController) -> None:
        self._app = app
        self._admission = admission
        limits = admission.limits
        self._upload_bytes = limits.max_images * limits.max_image_bytes + MAX_FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").rstrip("/")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if path.endswith(BLOCKED_ROUTES):
            error = ApiError(404, "Unknown route.", code="not_found")
            await error.response()(scope, receive, send)
            return
        limit = self._upload_bytes if path.endswith("/upload") else MAX_BODY_BYTES
        rejection = body_too_large(limit).response()
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            await rejection(scope, receive, send)
            return
        size = 0  # of the body
        has_started = is_open = False  # the response

        async def receive_limited() -> Message:
            nonlocal size
            message: Message = {"type": "http.disconnect"} if size > limit else await receive()
            size += len(message.get("body", b""))
            return {"type": "http.disconnect"} if size > limit else message

        async def send_response(message: Message) -> None:
            nonlocal has_started, is_open
            if size > limit and not has_started:
                return  # gradio's response to an incomplete body
            has_started = True
            is_open = message.get("more_body", message["type"] == "http.response.start")
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive_limited, send_response)
        except asyncio.CancelledError:
            if not self._admission.shutting_down:
                raise
            if is_open:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception:  # any error of gradio about an incomplete body
            if has_started or size <= limit:
                raise
        if size > limit and not has_started:
            await rejection(scope, receive, send)
