"""The part that all generating routes share: from a request to its answers.

::

    body ──checks──► AdmissionController ──► ResponseStream ──► Reply ──► JSON, or events

When a client disconnects, its answers end and its slot in the engine becomes free.

The response objects are dictionaries with types (`TypedDict`): there is one for every token, and
they can have lone surrogates of the request, which pydantic does not encode.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from owl2.engine.engine import Engine, Prompt
from owl2.engine.output import CompletionChunk
from owl2.engine.sampling_params import DEFAULT_MAX_NEW_TOKENS
from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import ImagePolicy
from owl2.serve import errors
from owl2.serve.admission import (
    AdmissionController,
    ResponseStream,
    abort_reason,
    run_unless,
)
from owl2.serve.config import ServerLimits
from owl2.serve.protocol import UsageInfo
from owl2.serve.request_limits import check_limits
from owl2.serve.sampling_fields import NO_LIMIT, GenerationRequest

# After the deadline of the request, for a client that reads slowly.
FLUSH_SECONDS = 30.0
JSON_PART_LENGTH = 32  # items of a list that are encoded together
# Of every generating route, for its documentation.
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    **errors.responses(400, 401, 404, 408, 413, 429, 500, 503),
}


class Reply(ABC):
    """The response to a request: `complete`, or `events` for a request with `stream`.

    Attributes:
        adapter: The adapter of the engine that the request selects.
        image_policy: Of the adapter, instead of that of the checkpoint.
    """

    adapter: str | None = None
    image_policy: ImagePolicy | None = None

    def __init__(self, stream: ResponseStream) -> None:
        self._stream = stream

    @abstractmethod
    async def prompts(self) -> Sequence[Prompt]:
        """The prompts; see `ResponseStream.start`."""

    @abstractmethod
    def complete(self, answers: Sequence[CompletionChunk]) -> Mapping[str, Any]:
        """The response with all answers. Called in a thread if it has log-probabilities."""

    @abstractmethod
    def generate_events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Raises as `ResponseStream.next`."""

    def error_event(self, error: errors.ApiError) -> bytes:
        """The last event after an error: the status has been sent already."""
        return encode_event(error.body())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; errors become the last event."""
        try:
            async with aclosing(self.generate_events()) as events:
                async for event in events:
                    yield event
        except Exception as error:
            self._stream.close(abort_reason(error))
            yield self.error_event(errors.as_api_error(error))

    def usage(self) -> UsageInfo:
        """The numbers of tokens so far."""
        prompt, answers = self._stream.prompt_tokens, self._stream.answer_tokens
        return UsageInfo(
            prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers
        )

    def chunk_usage(self, request: GenerationRequest) -> dict[str, Any]:
        """The field `usage` of a chunk before the last one."""
        if not request.include_usage:
            return {}
        return {"usage": self.usage() if request.has_continuous_usage else None}


class GenerationHandler:
    """Answers requests.

    Args:
        model_name: The value of `model` in requests for the base model. Those for an adapter have
            its name.
        check_answers: Raises an `ApiError` for the name of a model that gives only scores.
    """

    def __init__(
        self,
        admission: AdmissionController,
        model_name: str,
        check_answers: Callable[[str], None],
    ) -> None:
        self.engine = admission.engine
        self._model_name = model_name
        self._admission = admission
        self._check_answers = check_answers

    async def respond(
        self,
        request: Request,
        body: GenerationRequest,
        make_reply: Callable[[ResponseStream], Reply],
    ) -> Response:
        """The response to a request.

        Raises:
            ApiError, InputError: The request is rejected, or fails before its stream has started.
            ClientStopped: The client has disconnected.
        """
        models = (self._model_name, *self.engine.adapters)
        if body.model not in models:
            raise errors.model_not_found(body.model, models)
        self._check_answers(body.model)
        sizes = body.counts() | {"image_tokens": self.engine.processor.num_image_tokens}
        check_limits(self._admission.limits, self.engine.context_length, **sizes)
        with ExitStack() as stack:
            stream = stack.enter_context(self._admission.admit(body.num_answers))
            reply = make_reply(stream)
            template_kwargs = body.template_kwargs
            if body.model != self._model_name:
                reply.adapter = template_kwargs["adapter"] = body.model
                processor = self.engine.processor_of(body.model)
                reply.image_policy = processor.image_processor.image_policy
            try:
                limit = token_limit(self.engine, self._admission.limits, body.max_answer_tokens)
                options = body.sampling_options() | limit
                start = stream.start(reply.prompts, options, template_kwargs)
                await run_unless(disconnected(request), start)
                if body.stream:
                    return EventStreamResponse(reply.events(), stream.deadline, stack.pop_all())
                answers = await run_unless(disconnected(request), stream.outputs())
            except InputError as error:
                if error.code is not ErrorCode.INVALID_FORMAT or not body.constraints:
                    raise
                param = next(iter(body.constraints))
                raise errors.ApiError(400, str(error), code="invalid_value", param=param) from error
        if options["top_logprobs"] is None:
            content = encode_json(reply.complete(answers))
        else:
            content = await asyncio.to_thread(lambda: encode_large_json(reply.complete(answers)))
        return Response(content, media_type="application/json")


def token_limit(engine: Engine, limits: ServerLimits, requested: int | None) -> dict[str, Any]:
    """The options of `Engine.sampling_params` that limit the tokens of an answer.

    Larger numbers than the server's limit are reduced to it, because clients send numbers for
    larger models. The engine reduces them to what fits into the context.

    Args:
        requested: `NO_LIMIT`: as many tokens as the server allows. None: the default of the
            checkpoint.
    """
    limit = limits.max_completion_tokens
    if requested is not None:
        return {"max_new_tokens": limit if requested == NO_LIMIT else min(requested, limit)}
    defaults = engine.model.generation_config
    return {
        "max_new_tokens": min(defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, limit),
        "max_length": None if defaults.max_new_tokens else defaults.max_length,
    }


def encode_json(data: Mapping[str, Any]) -> bytes:
    """JSON. A lone surrogate, which a field of the request can contain, is escaped."""
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace")


def encode_large_json(data: Mapping[str, Any]) -> bytes:
    """`encode_json` in a thread: Python's lock is not held for long, so that others can run."""

    def encode(value: Any) -> str:
        if isinstance(value, dict):
            items = (f"{encode(key)}: {encode(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        if not isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        if len(value) <= JSON_PART_LENGTH:
            return "[" + ", ".join(map(encode, value)) + "]"
        starts = range(0, len(value), JSON_PART_LENGTH)
        parts = (value[start : start + JSON_PART_LENGTH] for start in starts)
        return "[" + ", ".join(json.dumps(part, ensure_ascii=False)[1:-1] for part in parts) + "]"

    return encode(data).encode("utf-8", "backslashreplace")


def encode_event(data: Mapping[str, Any], event: str = "", is_large: bool = False) -> bytes:
    """A server-sent event with JSON; a large one is encoded in a thread."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + (encode_large_json if is_large else encode_json)(data) + b"\n\n"


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
                async with asyncio.timeout_at(self._deadline + FLUSH_SECONDS) as limit:
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                if not limit.expired():
                    raise
                # Not an error: uvicorn closes the connection, because the response is incomplete.
            finally:
                await self._events.aclose()


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
