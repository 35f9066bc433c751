"""`POST /v1/chat/completions`: answers in one response or as server-sent events.

::

    body ──► ChatCompletionRequest ──AdmissionController──► ResponseStream ──► JSON, or events

When a client disconnects, its answers end and its slot in the engine becomes free.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from owl2.engine.sampling import DEFAULT_MAX_NEW_TOKENS
from owl2.processing.chat_template import Message
from owl2.serve import errors
from owl2.serve.admission import (
    AdmissionController,
    ClientStopped,
    ResponseStream,
    check_text_length,
    run_unless,
)
from owl2.serve.config import ServerLimits
from owl2.serve.middleware import CLIENT_CLOSED_REQUEST
from owl2.serve.protocol import (
    ChatCompletionContentPartTextParam,
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from owl2.serve.request_images import RequestImages
from owl2.serve.responses import SSE_DONE, ResponseBuilder, sse_event
from owl2.serve.system_prompt import merge_system_prompt, supports_system_prompt

# After the deadline of the request, for a client that reads slowly.
FLUSH_SECONDS = 30.0

# Part of a route's `responses`: without it, FastAPI documents a status of 422.
OTHER_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": errors.ErrorResponse, "description": "Any other error"}
}


class ChatCompletionService:
    """Answers chat completion requests.

    Args:
        model_name: The value of `model` that requests must have.
    """

    def __init__(
        self, admission: AdmissionController, images: RequestImages, model_name: str
    ) -> None:
        self._admission = admission
        self._images = images
        self._model_name = model_name
        engine = admission.engine
        default = engine.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        self._default_max_tokens = min(default, admission.limits.max_completion_tokens)
        self._supports_system_prompt = supports_system_prompt(engine.processor)

    def add_route(self, app: FastAPI) -> None:
        """Add the route to an application."""

        @app.post(
            "/v1/chat/completions",
            response_model=ChatCompletionResponse,
            responses={
                200: {"content": {"text/event-stream": {}}},
                **errors.responses(400, 401, 404, 408, 413, 429, 500, 503),
                **OTHER_ERRORS,
            },
        )
        async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
            """Answer a conversation with images.

            With `stream`, the response consists of server-sent events: `data: {...}` with a
            `chat.completion.chunk` each, and `data: [DONE]` at the end.
            """
            return await self.create(body, request)

    async def create(self, body: ChatCompletionRequest, request: Request) -> Response:
        """The response, or with `stream` its beginning.

        Raises:
            ApiError, InputError: The request is invalid or cannot be answered.
        """
        if body.model != self._model_name:
            raise model_not_found(body.model, self._model_name)
        check_limits(body, self._admission.limits, self._admission.engine.context_length)
        builder = ResponseBuilder(body)
        with ExitStack() as stack:
            stream = stack.enter_context(self._admission.admit(body.num_answers))
            try:
                await run_unless(_disconnected(request), self._start(stream, body))
                builder.prompt_tokens = stream.prompt_tokens
                if body.stream:
                    events = _events(stream, builder)
                    return EventStreamResponse(events, stream.deadline, stack.pop_all())
                await run_unless(_disconnected(request), _collect(stream, builder))
            except ClientStopped:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(builder.response())

    async def _start(self, stream: ResponseStream, body: ChatCompletionRequest) -> None:
        options = body.sampling_options()
        options["max_new_tokens"] = options["max_new_tokens"] or self._default_max_tokens

        async def messages() -> list[Message]:
            decoded = await self._images.messages(body)
            return decoded if self._supports_system_prompt else merge_system_prompt(decoded)

        await stream.start(messages, options)


async def _collect(stream: ResponseStream, builder: ResponseBuilder) -> None:
    while (chunk := await stream.next()) is not None:
        builder.add(chunk)


async def _events(stream: ResponseStream, builder: ResponseBuilder) -> AsyncGenerator[bytes, None]:
    try:
        for part in builder.first_chunks():
            yield sse_event(part)
        while (chunk := await stream.next()) is not None:
            builder.add(chunk)
            for part in builder.chunks(chunk):
                yield sse_event(part)
        for part in builder.usage_chunks():
            yield sse_event(part)
        yield SSE_DONE
    except Exception as error:  # the status has been sent, so an event reports the error
        stream.close("timeout")  # no effect if the stream has failed by itself
        yield sse_event(errors.as_api_error(error).body())


class EventStreamResponse(StreamingResponse):
    """Server-sent events; closes the resources of the request at their end."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], deadline: float, resources: ExitStack
    ) -> None:
        # The headers keep proxies from buffering events.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._deadline = deadline
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            try:
                async with asyncio.timeout_at(self._deadline + FLUSH_SECONDS):
                    await super().__call__(scope, receive, send)
            finally:
                await self._events.aclose()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def model_not_found(requested: str, served: str) -> errors.ApiError:
    """404 for a request with another model's name."""
    return errors.ApiError(
        404,
        f"The model '{requested}' does not exist; this server has '{served}'.",
        code="model_not_found",
        param="model",
    )


def check_limits(body: ChatCompletionRequest, limits: ServerLimits, context: int) -> None:
    """Reject a request whose counts exceed a limit.

    Args:
        context: Of the model, in tokens.

    Raises:
        ApiError: 400, with the code of the limit and the field.
    """
    tokens_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    for what, count, limit, code, param in (
        ("messages", len(body.messages), limits.max_messages, "too_many_messages", "messages"),
        ("images", len(body.images), limits.max_images, "too_many_images", "messages"),
        ("answers", body.num_answers, limits.max_n, "too_many_answers", "n"),
        (
            "tokens per answer",
            body.max_answer_tokens or 0,
            limits.max_completion_tokens,
            "too_many_tokens",
            tokens_field,
        ),
    ):
        if count > limit:
            raise errors.ApiError(
                400,
                f"The request has {count} {what}; the limit of this server is {limit}.",
                code=code,
                param=param,
            )
    characters = sum(
        len(part.text)
        for message in body.messages
        for part in message.content
        if isinstance(part, ChatCompletionContentPartTextParam)
    )
    check_text_length(characters, context)
