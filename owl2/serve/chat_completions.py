"""`POST /v1/chat/completions`: answers to a conversation with images.

The fields follow https://platform.openai.com/docs/api-reference/chat.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from owl2.engine.output import CompletionChunk, TokenLogprob
from owl2.processing.messages import Message
from owl2.serve.admission import ResponseStream
from owl2.serve.generation import RESPONSES, GenerationHandler, Reply, encode_event
from owl2.serve.protocol import (
    ChatCompletionLogProb,
    ChatCompletionLogProbs,
    ChatCompletionLogProbsContent,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
)
from owl2.serve.request_images import RequestImages


def add_chat_completions(app: FastAPI, handler: GenerationHandler, images: RequestImages) -> None:
    """Add the route to an application."""

    @app.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=RESPONSES)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation with images.

        With `stream`, the response consists of server-sent events: `data: {...}` with a
        `chat.completion.chunk` each, and `data: [DONE]` at the end.
        """
        return await handler.respond(request, body, partial(ChatCompletion, body, images))


class ChatCompletion(Reply):
    """The response to a `ChatCompletionRequest`."""

    def __init__(
        self, request: ChatCompletionRequest, images: RequestImages, stream: ResponseStream
    ) -> None:
        super().__init__(stream)
        self._request = request
        self._images = images
        chosen = request.forced_function
        self._function = chosen and chosen.name
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def prompts(self) -> list[list[Message]]:
        """The conversation."""
        return [await self._images.messages(self._request.messages, self.image_policy)]

    def complete(self, answers: Sequence[CompletionChunk]) -> ChatCompletionResponse:
        """The response with all answers."""
        choices = [
            ChatCompletionResponseChoice(
                index=answer.index,
                message=self._message(answer.text),
                logprobs=self._logprobs(answer.logprobs) if self._request.logprobs else None,
                finish_reason=answer.finish_reason,
            )
            for answer in answers
        ]
        return ChatCompletionResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=self.usage(),
        )

    async def generate_events(self) -> AsyncGenerator[bytes, None]:
        """Chunks, and `[DONE]` at the end."""
        for index in range(self._request.num_answers):
            begin = self._delta("", is_first=True)
            yield self._event(index, {"role": "assistant", **begin, "refusal": None})
        while (chunk := await self._stream.next()) is not None:
            if chunk.text or chunk.logprobs:
                yield self._event(chunk.index, self._delta(chunk.text), chunk.logprobs)
            if chunk.finish_reason:
                yield self._event(chunk.index, {}, finish_reason=chunk.finish_reason)
        if self._request.include_usage:
            yield encode_event(self._chunk([]) | {"usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def _message(self, text: str) -> ChatMessage:
        """The message with this text, which may be the arguments of a call."""
        if self._function is None:
            return ChatMessage(role="assistant", content=text, refusal=None)
        calls = [self._call(text)]
        return ChatMessage(role="assistant", content=None, refusal=None, tool_calls=calls)

    def _delta(self, text: str, is_first: bool = False) -> dict[str, Any]:
        if self._function is None:
            return {"content": text}
        if is_first:
            return {"content": None, "tool_calls": [{"index": 0, **self._call(text)}]}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def _call(self, arguments: str) -> dict[str, Any]:
        function = {"name": self._function, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}

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
            "logprobs": self._logprobs(scores) if scores else None,
            "finish_reason": finish_reason,
        }
        return encode_event(self._chunk([choice]) | self.chunk_usage(self._request))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
        }

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> ChatCompletionLogProbs:
        # Tokens without bytes are not part of the content: the end token, and spaces after it.
        content: list[ChatCompletionLogProbsContent] = [
            {**self._token(score), "top_logprobs": [self._token(other) for other in score.top]}
            for score in scores
            if score.bytes
        ]
        return ChatCompletionLogProbs(content=content, refusal=None)

    def _token(self, score: TokenLogprob) -> ChatCompletionLogProb:
        # Special tokens, such as the end token, have no bytes.
        has_ids = self._request.return_tokens_as_token_ids
        text = f"token_id:{score.id}" if has_ids else score.text
        return ChatCompletionLogProb(token=text, logprob=score.logprob, bytes=score.bytes or None)
