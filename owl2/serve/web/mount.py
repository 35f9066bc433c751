"""Mount the page in an app, under `/web/`."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from owl2.engine.engine import Engine
from owl2.serve.admission import AdmissionController
from owl2.serve.auth import ApiKeys
from owl2.serve.config import ServerLimits
from owl2.serve.image_decoder import SandboxedImageDecoder
from owl2.serve.metrics import Metrics
from owl2.serve.middleware import WEB_PATH
from owl2.serve.web.examples import Example, draw_examples
from owl2.serve.web.gateway import PageGateway
from owl2.serve.web.page import HERE, Page, i18n, login_page, theme
from owl2.serve.web.uploads import UploadStore

# Seconds: maximum age of an upload, and the interval in which expired ones are deleted.
UPLOAD_MAX_AGE, DELETE_INTERVAL = 4 * 3600, 600


def mount(
    app: FastAPI,
    engine: Engine,
    limits: ServerLimits,
    *,
    name: str = "mPLUG-Owl2",
    keys: ApiKeys | None = None,
    examples: Sequence[Example] | None = None,
    allowed_origins: Sequence[str] = (),
) -> None:
    """Mount the page at `/web/` of an app, with the same engine and limits.

    It shares `app.state.admission` and `app.state.decoder`, which are created if they do not exist.

    Args:
        name: The model name that the page shows.
        keys: If given, visitors sign in with one of these keys as the password.
        examples: As from `read_examples`; default: `draw_examples`.
        allowed_origins: Websites whose pages may use this page, such as `https://example.com`.

    Raises:
        InputError: As `SandboxedImageDecoder`.
    """
    if not hasattr(app.state, "admission"):
        limits = limits.with_frames(engine.processor.num_frames)
        app.state.admission = AdmissionController(engine, limits, Metrics())
        app.state.decoder = SandboxedImageDecoder(limits, engine.processor.image_processor)
    app.state.decoder.start()
    if examples is None:
        examples = draw_examples(Path(os.environ["GRADIO_TEMP_DIR"]))
    uploads = UploadStore(os.environ["GRADIO_TEMP_DIR"], limits)
    page = Page(app.state.admission, app.state.decoder, name, examples, uploads, keys is not None)

    async def delete_expired_uploads() -> None:
        while True:
            await asyncio.sleep(DELETE_INTERVAL)
            await uploads.delete_expired(UPLOAD_MAX_AGE)
            for files in page.temp_file_sets:  # gradio's list of them, which would grow
                files.clear()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(delete_expired_uploads())
        yield
        task.cancel()
        uploads.close()

    gr.mount_gradio_app(
        app,
        page,
        WEB_PATH,
        app_kwargs={"lifespan": lifespan},
        theme=theme(),
        css=(HERE / "page.css").read_text("utf-8"),
        i18n=i18n,
        auth=None if keys is None else lambda _, password: keys.is_valid(password),
        max_file_size=limits.max_upload_file_bytes,
        allowed_paths=[str(file) for example in examples for file in example.images],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    route: Any = app.routes[-1]
    functions = {index for index, function in page.fns.items() if function.fn is not None}
    route.app = PageGateway(
        route.app,
        functions,
        app.state.admission,
        uploads,
        tuple(allowed_origins),
        login_page="" if keys is None else login_page(name),
    )
