"""The API as an ASGI app: OpenAI's routes, health, metrics and a page that documents them."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl2 import __version__
from owl2.engine.engine import Engine
from owl2.serve import errors
from owl2.serve.admission import Desk
from owl2.serve.auth import Keys
from owl2.serve.chat_completions import CLIENT_LEFT, OTHERS, ChatService, add_chat
from owl2.serve.docs_page import page
from owl2.serve.limits import Limits
from owl2.serve.metrics import Metrics
from owl2.serve.middleware import Door
from owl2.serve.protocol import Model, ModelList
from owl2.serve.request_images import Images

# What needs no key: monitoring, reading, and the web page, which asks for the key itself.
PAGE = "/web"
FREE = ("/health", "/metrics", "/docs", "/openapi.json", PAGE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a server is told beside its engine.

    Attributes:
        name: what the model is called in requests and replies.
        limits: of requests, and of how many.
        keys: who may ask; None: everyone.
        example: a command that works, for the page of documentation.
    """

    name: str
    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    example: str = ""


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The app. Its `state.desk` knows what is being answered, and refuses what is new if told."""
    limits = settings.limits
    metrics = Metrics()
    desk = Desk(engine, limits, metrics)
    images = Images(limits, engine.processor.image_processor)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        images.start()
        yield
        images.close()

    app = FastAPI(
        title=f"{settings.name} on owl2",
        version=__version__,
        description="mPLUG-Owl2 behind the interface of OpenAI's chat completions.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.desk = desk
    add_chat(app, ChatService(desk, images, settings.name))
    _add_models(app, settings.name)
    _add_health(app, desk, metrics)
    _add_document(app, settings.example)
    errors.add_handlers(app)
    app.add_middleware(Door, limits=limits, keys=settings.keys, free=FREE)
    app.add_middleware(_Counted, metrics=metrics)  # outside of the door: it counts who is refused
    return app


def _add_models(app: FastAPI, name: str) -> None:
    model = Model(id=name, object="model", created=int(time.time()), owned_by="owl2")

    @app.get("/v1/models", responses=errors.responses(401))
    async def list_models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[model])

    # A hub id has a slash in it.
    @app.get("/v1/models/{name:path}", responses=errors.responses(401, 404) | OTHERS)
    async def retrieve_model(name: str) -> Model:
        """The model of that name."""
        if name != model.id:
            raise errors.ApiError(
                404,
                f"There is no model '{name}' here; this server has '{model.id}'.",
                code="model_not_found",
                param="model",
            )
        return model


def _add_health(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.get("/health", responses=errors.responses(503))
    async def health() -> dict[str, str]:
        """Whether requests are taken: 200, or 503 while the server finishes its last ones."""
        if desk.closing:
            raise errors.closing()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_document(app: FastAPI, example: str) -> None:
    @app.get("/docs", include_in_schema=False)
    async def document() -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), example))


class _Counted:
    """Counts requests by route and status, and writes a line of each to the log.

    The line has the route's pattern, never what the client wrote: no key, no image, no text.
    What nobody caught is answered here, too: Starlette's own layer would raise it again, and the
    connection, which the client means to use again, would be closed.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:  # any code of ours
            if status:
                raise  # half a reply was sent: the connection has to be closed
            await errors.as_api_error(error).response()(scope, receive, send_on)
        finally:
            # The page is a hundred files, which are one place and no news.
            is_page = scope["path"].startswith(f"{PAGE}/")
            route = PAGE if is_page else getattr(scope.get("route"), "path", "none")
            status = status or CLIENT_LEFT  # in the middle of its own request
            self.metrics.requests.labels(route, status).inc()
            client = scope["client"][0] if scope.get("client") else "-"
            seconds = time.perf_counter() - begun
            level = logging.DEBUG if is_page else logging.INFO
            words = "%s %s %s %d %.2f s"
            logger.log(level, words, client, scope["method"], route, status, seconds)
