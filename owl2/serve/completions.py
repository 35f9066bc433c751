"""`POST /v1/completions`: answers that continue texts without a chat template.

The fields follow https://platform.openai.com/docs/api-reference/completions.
"""

import asyncio
import math
import time
import uuid
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response

from owl2.engine.detokenizer import token_texts
from owl2.engine.engine import Engine
from owl2.engine.output import CompletionChunk, TokenLogprob
from owl2.engine.scoring import score_prompt
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.serve.admission import ResponseStream
from owl2.serve.generation import RESPONSES, GenerationHandler, Reply, encode_event
from owl2.serve.protocol import (
    CompletionLogProbs,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    UsageInfo,
)


def add_completions(app: FastAPI, handler: GenerationHandler) -> None:
    """Add the route to an application."""
    token_text = token_texts(handler.engine.processor.tokenizer)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=RESPONSES)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, without a chat template and without images.

        With `stream`, the response consists of server-sent events: `data: {...}` with a
        `text_completion` each, and `data: [DONE]` at the end.
        """
        reply = partial(TextCompletion, body, handler.engine, token_text)
        return await handler.respond(request, body, reply)


class TextCompletion(Reply):
    """The response to a `CompletionRequest`.

    Args:
        token_text: See `token_texts`.
    """

    def __init__(
        self,
        request: CompletionRequest,
        engine: Engine,
        token_text: Callable[[int], tuple[str, bytes]],
        stream: ResponseStream,
    ) -> None:
        super().__init__(stream)
        self._request = request
        self._engine = engine
        self._token_text = token_text
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # With `echo`: the text of each prompt and, with `logprobs`, its tokens.
        self._echoes: list[tuple[str, list[TokenLogprob]]] = []
        self._sent: Counter[int] = Counter()  # characters of each answer

    async def prompts(self) -> list[PreparedPrompt]:
        """The prompts as token ids."""
        encoded = [await asyncio.to_thread(self._encode, prompt) for prompt in self._request.prompt]
        if self._request.echo:
            pairs = zip(encoded, self._request.prompt, strict=True)
            self._echoes = [await asyncio.to_thread(self._echo, *pair) for pair in pairs]
        return encoded

    def _encode(self, prompt: str | list[int]) -> PreparedPrompt:
        processor = self._engine.processor
        if isinstance(prompt, str):
            has_start = self._request.add_special_tokens is not False
            ids = processor(text=prompt, add_special_tokens=has_start)["input_ids"][0]
        else:
            ids = prompt
        image = processor.image_token_id, processor.num_image_tokens
        prepared = PreparedPrompt.from_ids(ids, None, *image, is_continued=True)
        return self._engine.encode(prepared, adapter=self.adapter)

    def _echo(
        self, prompt: PreparedPrompt, source: str | list[int]
    ) -> tuple[str, list[TokenLogprob]]:
        engine, ids = self._engine, prompt.ids
        text = source if isinstance(source, str) else engine.processor.decode(source, True)
        if (top := self._request.logprobs) is None:
            return text, []
        image = engine.processor.image_token_id, engine.processor.num_image_tokens
        first = replace(PreparedPrompt.from_ids(ids[:1], None, *image), adapter=self.adapter)
        rows = engine.run_prefilled(first, partial(score_prompt, engine.model, ids, top))
        scores = [self._token(ids[0], math.nan)]  # no token precedes it
        for row in rows:
            own, *best = [self._token(*pair) for pair in row]
            scores.append(replace(own, top=tuple(best)))
        return text, scores

    def _token(self, id_: int, logprob: float) -> TokenLogprob:
        text, data = self._token_text(id_)
        return TokenLogprob(id_, text, list(data), logprob)

    def complete(self, answers: Sequence[CompletionChunk]) -> CompletionResponse:
        """The response with all answers."""
        response = self._response([self._choice(answer, is_first=True) for answer in answers])
        return response | {"usage": self.usage()}

    async def generate_events(self) -> AsyncGenerator[bytes, None]:
        """Chunks, and `[DONE]` at the end."""
        started = set()
        while (chunk := await self._stream.next()) is not None:
            if chunk.index in started or not self._echoes:
                yield self._event(chunk)
            else:  # log-probabilities of a long prompt
                yield await asyncio.to_thread(self._event, chunk, is_first=True)
            started.add(chunk.index)
        if self._request.include_usage:
            yield encode_event(self._response([]) | {"usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def usage(self) -> UsageInfo:
        """The numbers of tokens."""
        usage = super().usage()
        if self._request.max_tokens == 0:  # the generated token is discarded
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _event(self, chunk: CompletionChunk, is_first: bool = False) -> bytes:
        response = self._response([self._choice(chunk, is_first)])
        return encode_event(response | self.chunk_usage(self._request), is_large=is_first)

    def _response(self, choices: list[CompletionResponseChoice]) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._request.model,
            choices=choices,
        )

    def _choice(self, chunk: CompletionChunk, is_first: bool) -> CompletionResponseChoice:
        text, scores = chunk.text, list(chunk.logprobs)
        if self._request.max_tokens == 0:
            text, scores = "", []
        if is_first and self._echoes:
            prompt, prompt_scores = self._echoes[chunk.index // (self._request.n or 1)]
            text, scores = prompt + text, prompt_scores + scores
        logprobs = None
        if self._request.logprobs is not None:
            offsets = _text_offsets(scores, text, self._sent[chunk.index])
            logprobs = self._logprobs(scores, offsets)
        self._sent[chunk.index] += len(text)
        return CompletionResponseChoice(
            index=chunk.index, text=text, logprobs=logprobs, finish_reason=chunk.finish_reason
        )

    def _logprobs(self, scores: Sequence[TokenLogprob], offsets: list[int]) -> CompletionLogProbs:
        has_ids = self._request.return_tokens_as_token_ids

        def name(score: TokenLogprob) -> str:
            return f"token_id:{score.id}" if has_ids else score.text

        def best(score: TokenLogprob) -> dict[str, float]:
            return {name(other): other.logprob for other in (*score.top, score)}

        known = [None if math.isnan(score.logprob) else score for score in scores]
        return CompletionLogProbs(
            tokens=[name(score) for score in scores],
            token_logprobs=[score.logprob if score else None for score in known],
            top_logprobs=[best(score) if score else None for score in known],
            text_offset=offsets,
        )


def _text_offsets(scores: Sequence[TokenLogprob], text: str, offset: int) -> list[int]:
    """The position of each token in an answer.

    Args:
        text: The text of these tokens.
        offset: Its position in the answer.
    """
    offsets = []
    decoder = getincrementaldecoder("utf-8")("replace")
    for score in scores:
        offsets.append(offset)
        # SentencePiece puts a space before a prompt.
        is_added = not offset and score.text[:1] == " " != text[:1]
        offset += len(decoder.decode(bytes(score.bytes))) - is_added
    return offsets
