"""`POST /v1/chat/completions`: answers in one response or as server-sent events.

::

    body ──► ChatCompletionRequest ──AdmissionController──► ResponseStream ──► JSON, or events

When a client disconnects, its answers end and its slot in the engine becomes free.

The fields follow https://platform.openai.com/docs/api-reference/chat. The response objects are
plain dictionaries, because there is one for every token.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from owl2.engine.output import CompletionChunk, TokenLogprob
from owl2.engine.sampling import DEFAULT_MAX_NEW_TOKENS
from owl2.serve import errors
from owl2.serve.admission import (
    AdmissionController,
    ClientStopped,
    ResponseStream,
    check_limits,
    run_unless,
)
from owl2.serve.middleware import CLIENT_CLOSED_REQUEST
from owl2.serve.protocol import ChatCompletionRequest, ChatCompletionResponse
from owl2.serve.request_images import RequestImages

# After the deadline of the request, for a client that reads slowly.
FLUSH_SECONDS = 30.0


def add_chat_completions(
    app: FastAPI, admission: AdmissionController, images: RequestImages, model_name: str
) -> None:
    """Add the route to an application.

    Args:
        model_name: The value of `model` that requests must have.
    """
    engine, limits = admission.engine, admission.limits
    defaults = engine.model.generation_config
    default_max_tokens = min(
        defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        limits.max_completion_tokens,
    )

    async def start(stream: ResponseStream, body: ChatCompletionRequest) -> None:
        options = body.sampling_options()
        if options["max_new_tokens"] is None:
            options["max_new_tokens"] = default_max_tokens
            options["max_length"] = None if defaults.max_new_tokens else defaults.max_length
        await stream.start(lambda: images.messages(body), options)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletionResponse,
        responses={
            200: {"content": {"text/event-stream": {}}},
            **errors.responses(400, 401, 404, 408, 413, 429, 500, 503),
        },
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation with images.

        With `stream`, the response consists of server-sent events: `data: {...}` with a
        `chat.completion.chunk` each, and `data: [DONE]` at the end.
        """
        if body.model != model_name:
            raise errors.model_not_found(body.model, model_name)
        check_limits(limits, engine.context_length, **body.counts())
        with ExitStack() as stack:
            stream = stack.enter_context(admission.admit(body.num_answers))
            completion = ChatCompletion(body, stream)
            try:
                await run_unless(_disconnected(request), start(stream, body))
                if body.stream:
                    events = completion.events()
                    return EventStreamResponse(events, stream.deadline, stack.pop_all())
                reply = await run_unless(_disconnected(request), completion.complete())
            except ClientStopped:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(reply)


class ChatCompletion:
    """The response to a request: `complete`, or `events` for a request with `stream`."""

    def __init__(self, request: ChatCompletionRequest, stream: ResponseStream) -> None:
        self._stream = stream
        self._has_logprobs = bool(request.logprobs)
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._num_tokens = [0] * request.num_answers

    async def complete(self) -> dict[str, Any]:
        """The response after the last chunk. Raises as `ResponseStream.next`."""
        answers: list[list[CompletionChunk]] = [[] for _ in self._num_tokens]
        while (chunk := await self._stream.next()) is not None:
            answers[chunk.index].append(chunk)
            self._num_tokens[chunk.index] = chunk.num_tokens
        choices = []
        for index, chunks in enumerate(answers):
            text = "".join(chunk.text for chunk in chunks)
            scores = [score for chunk in chunks for score in chunk.logprobs]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": _logprobs(scores) if self._has_logprobs else None,
                    "finish_reason": chunks[-1].finish_reason,
                }
            )
        return {"object": "chat.completion", **self._head, "choices": choices} | self._usage()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. The status has been sent, so the last event reports an error."""
        try:
            for index in range(len(self._num_tokens)):
                yield self._event(index, {"role": "assistant", "content": "", "refusal": None})
            while (chunk := await self._stream.next()) is not None:
                self._num_tokens[chunk.index] = chunk.num_tokens
                if chunk.text or chunk.logprobs:
                    yield self._event(chunk.index, {"content": chunk.text}, chunk.logprobs)
                if chunk.finish_reason:
                    yield self._event(chunk.index, {}, finish_reason=chunk.finish_reason)
            if self._include_usage:
                yield _encode(self._chunk([]) | self._usage())
            yield b"data: [DONE]\n\n"
        except Exception as error:
            self._stream.close("timeout")  # no effect if the stream has failed by itself
            yield _encode(errors.as_api_error(error).body())

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        scores: Sequence[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(scores) if scores else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._include_usage else {}
        return _encode(self._chunk([choice]) | usage)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": "chat.completion.chunk", **self._head, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._stream.prompt_tokens, sum(self._num_tokens)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        return {"usage": usage | {"total_tokens": prompt + completion}}


def _encode(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _logprobs(scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(score) | {"top_logprobs": [_token(other) for other in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _token(score: TokenLogprob) -> dict[str, Any]:
    # Special tokens, such as the end token, have no bytes.
    return {"token": score.text, "logprob": score.logprob, "bytes": score.bytes or None}


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
