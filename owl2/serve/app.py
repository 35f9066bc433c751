"""The ASGI application: OpenAI's routes, health, metrics and the documentation page."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from owl2 import __version__
from owl2.engine.engine import Engine
from owl2.scoring.scorer import ImageScorer
from owl2.serve import errors
from owl2.serve.admission import AdmissionController, ClientStopped, InflightBytes
from owl2.serve.auth import ApiKeys, document_api_keys
from owl2.serve.chat_completions import add_chat_completions
from owl2.serve.classify import add_classify
from owl2.serve.completions import add_completions
from owl2.serve.config import ServerLimits
from owl2.serve.docs_page import docs_page
from owl2.serve.generation import GenerationHandler
from owl2.serve.json_body import JsonRoute
from owl2.serve.metrics import Metrics
from owl2.serve.middleware import (
    CLIENT_CLOSED_REQUEST,
    WEB_PATH,
    AuthAndBodyLimitMiddleware,
    RequestGuardMiddleware,
    RequestLogMiddleware,
)
from owl2.serve.request_images import RequestImages
from owl2.serve.responses import add_responses

# Paths without an API key: monitoring, documentation, and the web page, which has its own sign-in.
PUBLIC_PATHS = ("/health", "/metrics", "/docs", "/openapi.json", WEB_PATH)


class ModelCard(BaseModel):
    """A served model; `parent` is the base model of an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


def build_app(
    engine: Engine,
    model_name: str,
    limits: ServerLimits | None = None,
    api_keys: ApiKeys | None = None,
    example: str = "",
    allowed_hosts: Sequence[str] | None = None,
    allowed_origins: Sequence[str] = (),
    scorers: Mapping[str, ImageScorer] | None = None,
    score_only: Mapping[str, str] | None = None,
) -> FastAPI:
    """The application; its `state` has the `AdmissionController` and the image decoder.

    Args:
        model_name: The value of `model` in requests and responses. The adapters of the engine have
            their names.
        limits: Default: `ServerLimits()`.
        api_keys: None: every client is accepted.
        example: A shell command for the documentation page.
        allowed_hosts: Host names that requests may use, besides localhost; None: all.
        allowed_origins: Websites whose pages may send requests, such as `https://example.com`.
        scorers: For `POST /classify`, by the names of the model and the adapters that give scores.
        score_only: By name, the published checkpoint of a model that answers no questions.
    """
    limits = (limits or ServerLimits()).with_frames(engine.processor.num_frames)
    metrics = Metrics()
    admission = AdmissionController(engine, limits, metrics)
    inflight = InflightBytes(limits.max_inflight_bytes)
    images = RequestImages(limits, engine.processor.image_processor, inflight)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        images.decoder.start()
        yield
        images.decoder.close()

    app = FastAPI(
        title=f"{model_name} on owl2",
        version=__version__,
        description="mPLUG-Owl2 with an API compatible with OpenAI's chat completions.",
        docs_url=None,  # FastAPI's page loads scripts from another server
        redoc_url=None,
        lifespan=lifespan,
    )
    app.router.route_class = JsonRoute
    app.state.admission, app.state.decoder = admission, images.decoder

    def check_answers(name: str) -> None:
        if score_only and name in score_only:
            raise errors.model_without_answers(name, score_only[name], name in (scorers or {}))

    handler = GenerationHandler(admission, model_name, check_answers)
    add_chat_completions(app, handler, images)
    add_completions(app, handler)
    add_responses(app, handler, images)
    if scorers:
        add_classify(app, admission, images, scorers)
    _add_models(app, model_name, engine.adapters)
    _add_monitoring(app, admission, metrics)

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi(), example))

    if api_keys is not None:
        document_api_keys(app, PUBLIC_PATHS)
    errors.add_handlers(app)

    @app.exception_handler(ClientStopped)
    async def end(request: Request, error: ClientStopped) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # no client receives it

    # The last one is the outermost: the log has rejected requests.
    app.add_middleware(
        AuthAndBodyLimitMiddleware,
        limits=limits,
        inflight=inflight,
        api_keys=api_keys,
        public_paths=PUBLIC_PATHS,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Request-ID"],
    )
    app.add_middleware(
        RequestGuardMiddleware, allowed_hosts=allowed_hosts, allowed_origins=allowed_origins
    )
    app.add_middleware(RequestLogMiddleware, metrics=metrics)
    return app


def _add_models(app: FastAPI, model_name: str, adapters: Sequence[str]) -> None:
    card = partial(ModelCard, object="model", created=int(time.time()), owned_by="owl2")
    models = {name: card(id=name, parent=model_name) for name in adapters}
    models = {model_name: card(id=model_name, parent=None)} | models

    @app.get("/v1/models", responses=errors.responses(401))
    async def list_models() -> ModelList:
        """List the served model and its adapters."""
        return ModelList(object="list", data=list(models.values()))

    # The path converter accepts the slash of a hub id.
    @app.get("/v1/models/{name:path}", responses=errors.responses(401, 404))
    async def retrieve_model(name: str) -> ModelCard:
        """Return the model with this name."""
        if name not in models:
            raise errors.model_not_found(name, models)
        return models[name]


def _add_monitoring(app: FastAPI, admission: AdmissionController, metrics: Metrics) -> None:
    @app.get("/health", responses=errors.responses(503))
    async def health() -> dict[str, str]:
        """Return 200 while the server accepts requests, 503 while it shuts down."""
        if admission.shutting_down:
            raise errors.shutting_down()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
