"""`POST /v1/chat/completions`: a question and its answers, whole or in server-sent events.

::

    body ──schema──► ChatRequest ──Desk──► Answer ──Reply──► JSON, or events

A client that goes away is noticed in every part of it, and its place at the engine is free.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from owl2.engine.sampling import DEFAULT_MAX_NEW_TOKENS
from owl2.processing.chat_template import Message
from owl2.serve import errors
from owl2.serve.admission import Answer, Desk, Visit
from owl2.serve.limits import check, check_length
from owl2.serve.protocol import ChatReply, ChatRequest, TextPart
from owl2.serve.request_images import Images
from owl2.serve.responses import DONE, Reply, event
from owl2.serve.system_prompt import into_first_turn, takes_system_prompt

# After the last token: what a client takes longer to read is cut.
READING_SECONDS = 30.0
# nginx's number for a client that left. Nobody reads it but the metrics.
CLIENT_LEFT = 499

# For a route's `responses`; without it FastAPI says that it answers 422, which it does not.
OTHERS: dict[int | str, dict[str, Any]] = {
    "default": {"model": errors.ErrorReply, "description": "Any other error"}
}

Result = TypeVar("Result")


class ClientLeft(Exception):
    """Nobody is there any more to read the reply."""


class ChatService:
    """Answers chat requests.

    Args:
        name: of the model, which a request must give.
    """

    def __init__(self, desk: Desk, images: Images, name: str) -> None:
        self.desk = desk
        self.images = images
        self.name = name
        default = desk.engine.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        self._takes_system_prompt = takes_system_prompt(desk.engine.processor)
        self._max_tokens = min(default, desk.limits.answer_tokens)

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        """The reply, or where it is to be streamed, its beginning.

        Raises:
            ApiError, InputError: what is wrong with the request, or why it cannot be answered.
        """
        if body.model != self.name:
            raise errors.ApiError(
                404,
                f"There is no model '{body.model}' here; this server has '{self.name}'.",
                code="model_not_found",
                param="model",
            )
        check(body, self.desk.limits)
        self._check_length(body)
        reply = Reply(self.name, body)
        with ExitStack() as stack:
            visit = stack.enter_context(self.desk.visit())
            try:
                answer = await unless_gone(request, self._begin(visit, body, reply, stack))
                if body.stream:
                    events = self._events(visit, answer, reply)
                    return EventStream(events, visit, stack.pop_all())
                await unless_gone(request, self._finish(visit, answer, reply))
            except ClientLeft:
                return Response(status_code=CLIENT_LEFT)
        return JSONResponse(reply.whole())

    def _check_length(self, body: ChatRequest) -> None:
        characters = sum(
            len(part.text)
            for message in body.messages
            for part in message.content
            if isinstance(part, TextPart)
        )
        check_length(characters, self.desk.engine.context_length)

    async def _begin(
        self, visit: Visit, body: ChatRequest, reply: Reply, stack: ExitStack
    ) -> Answer:
        options = body.options()
        options["max_new_tokens"] = options["max_new_tokens"] or self._max_tokens
        messages = partial(self._messages, body)
        async with self.desk.in_time(visit):
            answer = await self.desk.answer(visit, messages, body.answers, options)
            stack.enter_context(answer)
            reply.prompt_tokens = await answer.begun()
        return answer

    async def _messages(self, body: ChatRequest) -> list[Message]:
        messages = await self.images.messages(body.messages)
        return messages if self._takes_system_prompt else into_first_turn(messages)

    async def _finish(self, visit: Visit, answer: Answer, reply: Reply) -> None:
        async with self.desk.in_time(visit):
            while (piece := await answer.next()) is not None:
                reply.add(piece)

    async def _events(
        self, visit: Visit, answer: Answer, reply: Reply
    ) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in reply.opening():
                yield event(chunk)
            while True:
                # Not around all of it: time may pass, and be over, while the client reads.
                async with self.desk.in_time(visit):
                    piece = await answer.next()
                if piece is None:
                    break
                reply.add(piece)
                for chunk in reply.chunks(piece):
                    yield event(chunk)
            for chunk in reply.closing():
                yield event(chunk)
            yield DONE
        except Exception as error:  # the status was sent long ago: the stream must say it
            answer.close("cut")  # if it did not end by itself
            yield event(errors.as_api_error(error).body())


class EventStream(StreamingResponse):
    """Server-sent events, and what is to be done when they end, however that is."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], visit: Visit, afterwards: ExitStack
    ) -> None:
        # Proxies must hand on each event as it comes.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._visit = visit
        self._afterwards = afterwards

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._afterwards:
            try:
                async with asyncio.timeout_at(self._visit.deadline + READING_SECONDS):
                    await super().__call__(scope, receive, send)
            finally:
                await self._events.aclose()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives, which is cancelled when the client goes away.

    Raises:
        ClientLeft: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def add_chat(app: FastAPI, service: ChatService) -> None:
    """Put the route into the app."""

    @app.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses={
            200: {"content": {"text/event-stream": {}}},
            **errors.responses(400, 401, 404, 408, 413, 429, 500, 503),
            **OTHERS,
        },
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation about images.

        With `stream` the answer comes as server-sent events, `data: {...}` with a
        `chat.completion.chunk` each, and in the end `data: [DONE]`.
        """
        return await service.answer(body, request)
