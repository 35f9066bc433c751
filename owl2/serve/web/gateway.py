"""The routes of the page, between the browser and gradio.

::

    request ──► known route? 404 ──► same website? 403 ──► size of the body: 413
            ──► uploads and files: here, others: gradio, with the visitor in its session

gradio has many routes that the page does not need. Some fetch URLs, run functions or return files
of the server. Only the routes in `ROUTES` exist here.

gradio's sessions have a name that the browser selects, and everyone who has the name can use the
session. Here the name that gradio receives begins with the visitor, who is known by a cookie.
"""

import asyncio
import errno
import hashlib
import json
import mimetypes
import os
import re
import secrets
from collections.abc import Collection
from typing import Any
from urllib.parse import urlencode

from gradio.route_utils import XSS_SAFE_MIMETYPES, upload_fn
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl2.serve.admission import AdmissionController
from owl2.serve.config import MIB
from owl2.serve.errors import ApiError, as_api_error, log_bug
from owl2.serve.json_body import parse_json
from owl2.serve.origins import check_origin, client_network
from owl2.serve.web.conversation import is_video
from owl2.serve.web.exchange import PageExchange
from owl2.serve.web.uploads import FILE_OVERHEAD, UploadStore

API = "/gradio_api"
UPLOAD, FILE = ("POST", f"{API}/upload"), ("GET", f"{API}/file={{path:path}}")
JOIN, CANCEL = ("POST", f"{API}/queue/join"), ("POST", f"{API}/cancel")
EVENTS = ("GET", f"{API}/queue/data")
HEARTBEAT = ("GET", f"{API}/heartbeat/{{session_hash}}")
PAGE = ("GET", "/")
# All routes of the page. Every other route of gradio is unknown to clients.
ROUTES = (
    PAGE,
    UPLOAD,
    FILE,
    JOIN,
    CANCEL,
    EVENTS,
    HEARTBEAT,
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("GET", "/static/{path:path}"),
    ("GET", "/assets/{path:path}"),
    ("POST", "/login"),
    ("GET", "/logout"),
)
_PATTERNS = [(route, compile_path(route[1])[0]) for route in ROUTES]

# The fields of the bodies of `JOIN` and `CANCEL`.
FIELDS = ("data", "fn_index", "event_data", "event_id", "trigger_id", "session_hash")

# gradio trusts some headers of a proxy, for example for the host of redirects.
PASSED_HEADERS = {
    *("accept", "accept-encoding", "accept-language", "content-length", "content-type", "cookie"),
    *("host", "if-modified-since", "if-none-match", "range", "user-agent", "x-forwarded-proto"),
}

# Limit of a request without files.
MAX_BODY_BYTES = 2 * MIB
MAX_VALUES = 2**13  # of a JSON body
# Limit of the parts of an upload that are not files.
MAX_FORM_BYTES = MIB

COOKIE = "owl2-visitor"


def session_owner(session_hash: str | None) -> str:
    """The visitor of a session of gradio."""
    return (session_hash or "").partition(".")[0]


class PageGateway:
    """The application at `/web`.

    Args:
        gradio: The application of gradio.
        functions: Indices of the functions that the browser may run.
        allowed_origins: See `check_origin`.
        login_page: The HTML for visitors who have not signed in; empty if they need not.

    Attributes:
        gradio, uploads: As given.
    """

    def __init__(
        self,
        gradio: ASGIApp,
        functions: Collection[int],
        admission: AdmissionController,
        uploads: UploadStore,
        allowed_origins: Collection[str] = (),
        login_page: str = "",
    ) -> None:
        self.gradio = gradio
        self._login_page = login_page
        self._functions = functions
        self._admission = admission
        self.uploads = uploads
        self._allowed_origins = allowed_origins
        limits = admission.limits
        self._max_files = limits.max_images + limits.max_videos
        self._max_file_bytes = limits.max_upload_file_bytes
        self._upload_bytes = limits.max_images * limits.max_image_bytes + MAX_FORM_BYTES
        self._upload_bytes += limits.max_videos * limits.max_video_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.gradio(scope, receive, send)
            return
        exchange = PageExchange(receive, send)
        problem: Exception | None = None
        try:
            await self._respond(Request(scope, exchange.receive), exchange)
        except asyncio.CancelledError:
            # gradio keeps a connection open for each page, which is cancelled at shutdown.
            if not self._admission.shutting_down:
                raise
        except Exception as error:
            problem = error
        if exchange.has_started:
            # gradio raises an HTTPException for a session that ends during its stream.
            if problem is not None and not isinstance(problem.__cause__, HTTPException):
                log_bug(problem)
            await exchange.finish()
            return
        problem = exchange.take_rejection() or problem
        if problem is not None and not isinstance(problem, ClientDisconnect):
            await as_api_error(problem).response()(scope, receive, exchange.send)

    async def _respond(self, request: Request, exchange: PageExchange) -> None:
        route, parameters = _find_route(request)
        limits = self._admission.limits
        if route[1].startswith(API) or route[1] in ("/login", "/logout"):
            check_origin(request.headers, self._allowed_origins)
        size, seconds = MAX_BODY_BYTES, limits.body_timeout
        if route == UPLOAD:
            size, seconds = self._upload_bytes, seconds * self._max_files
        exchange.limit(size, seconds, request.headers)
        if route == PAGE and not _visitor(request):
            exchange.cookie = _new_cookie(request)
        if route == UPLOAD:
            response: Response = await self._receive_upload(request)
        elif route == FILE:
            response = await self._send_file(request, parameters["path"])
        elif route == PAGE and self._login_page and not await self._is_signed_in(request):
            response = HTMLResponse(self._login_page, headers={"Cache-Control": "no-store"})
        else:
            await self._pass(request, exchange, route, parameters)
            return
        await response(request.scope, exchange.receive, exchange.send)

    async def _pass(
        self, request: Request, exchange: PageExchange, route: tuple[str, str], parameters: Any
    ) -> None:
        """Let gradio respond, with the visitor in the session and without unknown parameters."""
        headers = [
            item for item in request.scope["headers"] if item[0].decode("latin-1") in PASSED_HEADERS
        ]
        scope = {**request.scope, "headers": headers, "query_string": b""}
        if route == EVENTS:
            session = self._session(request, request.query_params.get("session_hash"))
            scope["query_string"] = urlencode({"session_hash": session}).encode()
        elif route == HEARTBEAT:
            session = self._session(request, parameters["session_hash"])
            scope["path"] = scope["path"].rpartition("/")[0] + f"/{session}"
            scope["raw_path"] = scope["path"].encode()
        elif route in (JOIN, CANCEL):
            body = await self._rewrite(request, route)
            scope["headers"] = [item for item in headers if item[0] != b"content-length"]
            scope["headers"].append((b"content-length", str(len(body)).encode()))
            exchange.replace_body(body)
        await self.gradio(scope, exchange.receive, exchange.send)

    async def _rewrite(self, request: Request, route: tuple[str, str]) -> bytes:
        body = await parse_json(await request.body(), MAX_VALUES)
        index = body.get("fn_index") if isinstance(body, dict) else None
        if not isinstance(index, int) or index not in self._functions:
            raise ApiError(404, "Unknown function.", code="not_found")
        body = {key: body[key] for key in FIELDS if key in body}
        body["session_hash"] = self._session(request, body.get("session_hash"))
        return json.dumps(body).encode()

    def _session(self, request: Request, session_hash: Any) -> str:
        if not isinstance(session_hash, str) or not re.fullmatch(r"\w{1,64}", session_hash, re.A):
            raise ApiError(400, "Invalid session.", code="invalid_value", param="session_hash")
        return f"{_known_visitor(request)}.{session_hash}"

    async def _receive_upload(self, request: Request) -> Response:
        visitor = _known_visitor(request)
        await self._check_sign_in(request)
        directory = self.uploads.begin(visitor, client_network(request.client))

        async def receive() -> Message:
            message = await request.receive()
            self.uploads.add(directory, len(message.get("body", b"")))
            return message

        files: list[str] = []
        is_complete = False
        try:
            scope = Request(request.scope, receive)
            files, *_ = await upload_fn(scope, directory, self._max_file_bytes, None)
            self.uploads.add(directory, FILE_OVERHEAD * len(files))
            for file in files:
                self._check_size(file)
            is_complete = True
        except MultiPartException as error:
            status = 413 if error.message.startswith("File size") else 400
            raise ApiError(status, error.message, code="invalid_value") from error
        except (HTTPException, TypeError, ValueError) as error:
            raise ApiError(400, "The upload is invalid.", code="invalid_value") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = "The server has no space for uploads. Retry later."
            raise ApiError(507, message, code="upload_quota_exceeded") from error
        finally:
            if not (files and is_complete):
                self.uploads.delete(directory)
        return JSONResponse(files)

    def _check_size(self, file: str) -> None:
        limits = self._admission.limits
        limit = limits.max_video_bytes if is_video(file) else limits.max_image_bytes
        if os.path.getsize(file) > limit:
            message = f"The file is larger than the limit of {limit:,} bytes."
            raise ApiError(413, message, code="invalid_value")

    async def _send_file(self, request: Request, path: str) -> Response:
        await self._check_sign_in(request)
        if not self.uploads.can_read(_visitor(request), path):
            raise ApiError(404, "Unknown file.", code="not_found")
        kind = mimetypes.guess_type(path)[0]
        if kind not in XSS_SAFE_MIMETYPES:
            kind = None
        return FileResponse(
            path,
            media_type=kind or "application/octet-stream",
            filename=path.rpartition("/")[2],
            content_disposition_type="inline" if kind else "attachment",
        )

    async def _check_sign_in(self, request: Request) -> None:
        if not await self._is_signed_in(request):
            raise ApiError(401, "Sign in first.", code="invalid_api_key")

    async def _is_signed_in(self, request: Request) -> bool:
        """Ask gradio whether the visitor has signed in."""
        status = 0

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        path = f"{request.scope.get('root_path', '')}{API}/login_check"
        scope = {**request.scope, "method": "GET", "path": path, "raw_path": path.encode()}
        scope["query_string"] = b""
        await self.gradio(scope, receive, send)
        return status == 200


def _find_route(request: Request) -> tuple[tuple[str, str], dict[str, str]]:
    """The route of `ROUTES` and its parameters.

    Raises:
        ApiError: 404 or 405.
    """
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    matches = [(route, pattern.match(path)) for route, pattern in _PATTERNS]
    found = [(route, match.groupdict()) for route, match in matches if match]
    for route, parameters in found:
        if route[0] == request.method:
            return route, parameters
    if found:
        raise ApiError(405, "The method is not allowed.", code="method_not_allowed")
    raise ApiError(404, "Unknown route.", code="not_found")


def _visitor(request: Request) -> str:
    """The visitor, or an empty string."""
    cookie = request.cookies.get(COOKIE, "")
    is_valid = re.fullmatch(r"[\w-]{43}", cookie, re.ASCII)
    return hashlib.sha256(cookie.encode()).hexdigest()[:32] if is_valid else ""


def _known_visitor(request: Request) -> str:
    """The visitor.

    Raises:
        ApiError: 403.
    """
    if visitor := _visitor(request):
        return visitor
    message = "Open the page first. It needs a cookie of this server."
    raise ApiError(403, message, code="missing_cookie")


def _new_cookie(request: Request) -> str:
    is_secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
    response = Response()
    token = secrets.token_urlsafe(32)
    response.set_cookie(COOKIE, token, httponly=True, samesite="lax", secure=is_secure)
    return response.headers["set-cookie"]
