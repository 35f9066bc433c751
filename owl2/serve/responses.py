"""Pieces of answers → OpenAI's reply objects: one `chat.completion`, or its chunks as events.

The fields are those of https://platform.openai.com/docs/api-reference/chat. Chunks are plain
dictionaries: one is made for every token.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from owl2.engine.output import CompletionChunk, TokenLogprob
from owl2.serve.protocol import ChatRequest

DONE = b"data: [DONE]\n\n"


class Reply:
    """One request's reply.

    Args:
        model: the name that the server goes by.
        request: what was asked for.

    Attributes:
        prompt_tokens: to be set when they are known.
    """

    def __init__(self, model: str, request: ChatRequest) -> None:
        answers = request.answers
        self.prompt_tokens = 0
        self._scored = request.scores is not None
        # OpenAI's chunks say so where the usage is to come.
        options = request.stream_options
        self._no_usage: dict[str, Any] = (
            {"usage": None} if options is not None and options.include_usage else {}
        )
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self._model = model
        self._texts: list[list[str]] = [[] for _ in range(answers)]
        self._scores: list[list[TokenLogprob]] = [[] for _ in range(answers)]
        self._tokens = [0] * answers
        self._reasons: list[str | None] = [None] * answers

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, counted once, and of all answers, their end tokens too."""
        made = sum(self._tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def add(self, piece: CompletionChunk) -> None:
        """Take a piece, for `whole` and `usage`."""
        self._texts[piece.index].append(piece.text)
        self._scores[piece.index] += piece.logprobs
        self._tokens[piece.index] = piece.num_tokens
        self._reasons[piece.index] = piece.finish_reason

    def whole(self) -> dict[str, Any]:
        """The reply to a request without `stream`, after the last piece."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                "logprobs": _logprobs(self._scores[index]) if self._scored else None,
                "finish_reason": self._reasons[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunk of each answer: whose turn it is."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, delta) for index in range(len(self._texts))]

    def chunks(self, piece: CompletionChunk) -> list[dict[str, Any]]:
        """What a piece adds, and the answer's end in a chunk of its own."""
        chunks = []
        if piece.text or piece.logprobs:
            chunks.append(self._chunk(piece.index, {"content": piece.text}, piece.logprobs))
        if piece.finish_reason:
            chunks.append(self._chunk(piece.index, {}, reason=piece.finish_reason))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """The last chunk where usage was asked for: no answer's, with the counts."""
        chunk = self._object("chat.completion.chunk", [])
        return [chunk | {"usage": self.usage}] if self._no_usage else []

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        scores: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(scores) if scores else None,
            "finish_reason": reason,
        }
        return self._object("chat.completion.chunk", [choice]) | self._no_usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": kind, **self._head, "model": self._model, "choices": choices}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _logprobs(scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            _token(score) | {"top_logprobs": [_token(other) for other in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


def _token(score: TokenLogprob) -> dict[str, Any]:
    # A token that is no text, as the end token, has none.
    return {"token": score.text, "logprob": score.logprob, "bytes": score.bytes or None}
