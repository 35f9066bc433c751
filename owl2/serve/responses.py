"""OpenAI's response objects: one `chat.completion`, or `chat.completion.chunk`s as events.

The fields follow https://platform.openai.com/docs/api-reference/chat. The objects are plain
dictionaries, because there is one for every token.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from owl2.engine.output import CompletionChunk, TokenLogprob
from owl2.serve.protocol import ChatCompletionRequest

SSE_DONE = b"data: [DONE]\n\n"


class ResponseBuilder:
    """Collects the chunks of all answers to a request.

    Attributes:
        prompt_tokens: Set before the first chunk.
    """

    def __init__(self, request: ChatCompletionRequest) -> None:
        self.prompt_tokens = 0
        self._has_logprobs = bool(request.logprobs)
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self._model = request.model
        self._chunks: list[list[CompletionChunk]] = [[] for _ in range(request.num_answers)]

    def add(self, chunk: CompletionChunk) -> None:
        """Add a chunk of an answer."""
        self._chunks[chunk.index].append(chunk)

    def response(self) -> dict[str, Any]:
        """The response to a request without `stream`, after the last chunk."""
        choices = []
        for index, chunks in enumerate(self._chunks):
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
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """The first chunk of each answer, with the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, delta) for index in range(len(self._chunks))]

    def chunks(self, chunk: CompletionChunk) -> list[dict[str, Any]]:
        """The chunks of a chunk; the end of an answer has its own chunk."""
        chunks = []
        if chunk.text or chunk.logprobs:
            chunks.append(self._chunk(chunk.index, {"content": chunk.text}, chunk.logprobs))
        if chunk.finish_reason:
            chunks.append(self._chunk(chunk.index, {}, finish_reason=chunk.finish_reason))
        return chunks

    def usage_chunks(self) -> list[dict[str, Any]]:
        """The last chunk of the stream, if the request includes usage."""
        chunk = self._object("chat.completion.chunk", []) | {"usage": self._usage()}
        return [chunk] if self._include_usage else []

    def _usage(self) -> dict[str, int]:
        completion = sum(chunks[-1].num_tokens for chunks in self._chunks if chunks)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        scores: Sequence[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(scores) if scores else None,
            "finish_reason": finish_reason,
        }
        chunk = self._object("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self._include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": kind, **self._head, "model": self._model, "choices": choices}


def sse_event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _logprobs(scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(score) | {"top_logprobs": [_token(other) for other in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _token(score: TokenLogprob) -> dict[str, Any]:
    # Special tokens, such as the end token, have no bytes.
    return {"token": score.text, "logprob": score.logprob, "bytes": score.bytes or None}
