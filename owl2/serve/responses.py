"""`POST /v1/responses`: OpenAI's Responses API, without stored responses.

A request is answered as the chat request with the same meaning. The objects and events follow
https://platform.openai.com/docs/api-reference/responses.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from owl2.engine.output import CompletionChunk, TokenLogprob, join_chunks
from owl2.processing.image_io import ImagePolicy
from owl2.processing.messages import Message
from owl2.serve import errors
from owl2.serve.admission import ResponseStream
from owl2.serve.generation import RESPONSES, GenerationHandler, Reply, encode_event
from owl2.serve.request_images import RequestImages
from owl2.serve.responses_request import ResponsesRequest

# Error codes of a failed response; the API has no others for this server.
_FAILURES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def add_responses(app: FastAPI, handler: GenerationHandler, images: RequestImages) -> None:
    """Add the routes to an application."""

    @app.post("/v1/responses", responses=RESPONSES)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text, or messages with images, in the format of OpenAI's Responses API.

        Responses are not stored: `previous_response_id` is rejected; send the earlier messages and
        answers in `input`. With `stream`, the response consists of server-sent events.
        """
        if body.previous_response_id is not None:
            raise errors.ApiError(
                400,
                f"Previous response with id '{body.previous_response_id}' not found: this server "
                "does not store responses. Send the earlier messages and answers in 'input'.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        try:
            chat = body.to_chat()
            function = chat.forced_function
            name = function.name if function else None
            reply = partial(ModelResponse, body, name, partial(images.messages, chat.messages))
            return await handler.respond(request, chat, reply)
        except (errors.ApiError, RequestValidationError) as error:
            rejected = errors.as_api_error(error)
            rejected.param = body.param(rejected.param)
            raise rejected from error

    @app.api_route(
        "/v1/responses/{response_id}", methods=["GET", "DELETE"], include_in_schema=False
    )
    async def find_response(response_id: str) -> Response:
        """Responses are not stored: always 404."""
        raise errors.ApiError(
            404,
            f"Response with id '{response_id}' not found: this server does not store responses.",
            code="not_found",
            param="response_id",
        )


class ModelResponse(Reply):
    """The response to a `ResponsesRequest`: one message with one text, or one call.

    Args:
        function: The function that the answer calls; the text is then its arguments.
        read_messages: Returns the messages for the engine; its argument is `image_policy`.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        function: str | None,
        read_messages: Callable[[ImagePolicy | None], Awaitable[list[Message]]],
        stream: ResponseStream,
    ) -> None:
        super().__init__(stream)
        self._function = function
        self._read_messages = read_messages
        self._number = -1  # of the last event
        self._item_id = f"{'fc' if function else 'msg'}_{uuid.uuid4().hex}"
        self._call_id = f"call_{uuid.uuid4().hex}"
        chosen = request.text.format if request.text is not None else None
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": request.model,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {
                "format": {"type": "text"} if chosen is None else chosen.model_dump(by_alias=True)
            },
            "tool_choice": request.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "user": request.user,
        }

    async def prompts(self) -> list[list[Message]]:
        """The conversation."""
        return [await self._read_messages(self.image_policy)]

    def complete(self, answers: Sequence[CompletionChunk]) -> dict[str, Any]:
        """OpenAI's `Response`."""
        [answer] = answers
        is_complete = answer.finish_reason == "stop"
        status = "completed" if is_complete else "incomplete"
        return self._response(
            status,
            output=[self._item(status, answer)],
            completed_at=int(time.time()) if is_complete else None,
            incomplete_details=None if is_complete else {"reason": "max_output_tokens"},
            usage=self._usage(),
        )

    async def generate_events(self) -> AsyncGenerator[bytes, None]:
        """The events of OpenAI's API, from `response.created` to `response.completed`."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        item = self._item("in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": 0}
        if self._function is None:
            place["content_index"] = 0
            part = _text_part("", ())
            yield self._event("response.content_part.added", **place, part=part)
        kind = "output_text" if self._function is None else "function_call_arguments"
        chunks: list[CompletionChunk] = []
        while (chunk := await self._stream.next()) is not None:
            chunks.append(chunk)
            if chunk.text or chunk.logprobs:
                fields = place | {"delta": chunk.text} | self._logprobs(chunk.logprobs)
                yield self._event(f"response.{kind}.delta", **fields)
        if any(chunk.logprobs for chunk in chunks):
            ends = await asyncio.to_thread(self._last_events, kind, place, chunks)
        else:
            ends = self._last_events(kind, place, chunks)
        for event in ends:
            yield event

    def _last_events(
        self, kind: str, place: dict[str, Any], chunks: Sequence[CompletionChunk]
    ) -> list[bytes]:
        [answer] = join_chunks(chunks)
        response = self.complete([answer])
        event = partial(self._event, is_large=bool(answer.logprobs))
        [item] = response["output"]
        if self._function is None:
            fields = {"text": answer.text} | self._logprobs(answer.logprobs)
        else:
            fields = {"name": self._function, "arguments": answer.text}
        events = [event(f"response.{kind}.done", **place, **fields)]
        if self._function is None:
            events.append(event("response.content_part.done", **place, part=item["content"][0]))
        events.append(event("response.output_item.done", output_index=0, item=item))
        return [*events, event(f"response.{response['status']}", response=response)]

    def error_event(self, error: errors.ApiError) -> bytes:
        """`response.failed`."""
        code = _FAILURES.get(error.status, "server_error")
        failure = {"code": code, "message": error.body()["error"]["message"]}
        return self._event("response.failed", response=self._response("failed", error=failure))

    def _usage(self) -> dict[str, Any]:
        """OpenAI's `ResponseUsage`."""
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: str, **changes: Any) -> dict[str, Any]:
        rest = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
        return {**self._head, "status": status, "output": [], **rest, **changes}

    def _item(self, status: str, answer: CompletionChunk | None = None) -> dict[str, Any]:
        """The message or the call, which is empty until there is an answer."""
        head = {"id": self._item_id, "status": status}
        if self._function is not None:
            call = {"type": "function_call", "call_id": self._call_id, "name": self._function}
            return {**head, **call, "arguments": answer.text if answer else ""}
        content = [_text_part(answer.text, answer.logprobs)] if answer else []
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The field of an event; arguments of a call have none."""
        if self._function is not None:
            return {}
        return {"logprobs": [_token(score) for score in scores if score.bytes]}

    def _event(self, kind: str, is_large: bool = False, **fields: Any) -> bytes:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number, **fields}
        return encode_event(data, kind, is_large)


def _text_part(text: str, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    # Tokens without bytes are not part of the text: the end token, and spaces after it.
    logprobs = [_token(score, has_bytes=True) for score in scores if score.bytes]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _token(score: TokenLogprob, has_bytes: bool = False) -> dict[str, Any]:
    def fields(token: TokenLogprob) -> dict[str, Any]:
        data = {"bytes": token.bytes} if has_bytes else {}
        return {"token": token.text, "logprob": token.logprob, **data}

    return fields(score) | {"top_logprobs": [fields(other) for other in score.top]}
