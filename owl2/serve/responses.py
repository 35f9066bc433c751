"""OpenAI's response objects: one `chat.completion`, or `chat.completion.chunk`s as events.

The fields follow https://platform.openai.com/docs/api-reference/chat. The objects are plain
dictionaries, because there is one for every token.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from owl2.engine.output import Piece, TokenScore
from owl2.serve.protocol import ChatCompletionRequest

SSE_DONE = b"data: [DONE]\n\n"


class ResponseBuilder:
    """Collects the pieces of all answers to a request.

    Attributes:
        prompt_tokens: Set before the first piece.
    """

    def __init__(self, request: ChatCompletionRequest) -> None:
        self.prompt_tokens = 0
        self._has_logprobs = bool(request.logprobs)
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self._model = request.model
        self._pieces: list[list[Piece]] = [[] for _ in range(request.num_answers)]

    def add(self, piece: Piece) -> None:
        """Add a piece of an answer."""
        self._pieces[piece.index].append(piece)

    def response(self) -> dict[str, Any]:
        """The response to a request without `stream`, after the last piece."""
        choices = []
        for index, pieces in enumerate(self._pieces):
            text = "".join(piece.text for piece in pieces)
            scores = [score for piece in pieces for score in piece.scores]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": _logprobs(scores) if self._has_logprobs else None,
                    "finish_reason": pieces[-1].finish_reason,
                }
            )
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """The first chunk of each answer, with the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, delta) for index in range(len(self._pieces))]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece; the end of an answer has its own chunk."""
        chunks = []
        if piece.text or piece.scores:
            chunks.append(self._chunk(piece.index, {"content": piece.text}, piece.scores))
        if piece.finish_reason:
            chunks.append(self._chunk(piece.index, {}, finish_reason=piece.finish_reason))
        return chunks

    def usage_chunks(self) -> list[dict[str, Any]]:
        """The last chunk of the stream, if the request includes usage."""
        chunk = self._object("chat.completion.chunk", []) | {"usage": self._usage()}
        return [chunk] if self._include_usage else []

    def _usage(self) -> dict[str, int]:
        completion = sum(pieces[-1].tokens for pieces in self._pieces if pieces)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        scores: Sequence[TokenScore] = (),
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


def _logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    content = [
        _token(score) | {"top_logprobs": [_token(other) for other in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _token(score: TokenScore) -> dict[str, Any]:
    # Special tokens, such as the end token, have no bytes.
    return {"token": score.text, "logprob": score.logprob, "bytes": score.bytes or None}
