"""The event handlers of the chat: load the images, run the engine, update the page.

::

    text box ──ask──► Turn ──AdmissionController──► text chunks ──► updates of the page

The page and the API share the admission controller with its slots, queue and limits.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import Message
from owl2.serve.admission import (
    AdmissionController,
    ClientStopped,
    check_text_length,
    run_unless,
)
from owl2.serve.errors import ApiError, as_api_error
from owl2.serve.web.conversation import Conversation, Turn
from owl2.serve.web.examples import Example
from owl2.serve.web.i18n import error_text, show_error, show_info, text

# Minimum time between two updates of an answer, each of which sends all rows of the chat.
UPDATE_SECONDS = 0.05

MAX_SEED_DIGITS = 9  # so that every seed is valid

Decode = Callable[[bytes], Awaitable[Image.Image]]


class ChatUpdate(NamedTuple):
    """Outputs of a chat event: changes of the text box, and all rows of the chat."""

    box: Any
    rows: list[dict[str, Any]]


Updates = AsyncGenerator[ChatUpdate, None]


class ChatSettings(NamedTuple):
    """The settings tab.

    Attributes:
        language: Of the page. The model answers in the language of the question.
        seed: Digits or empty.
    """

    language: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: str


class ChatHandler:
    """The event handlers of the chat tab.

    Args:
        decode: Decodes an image file to RGB; raises `ApiError` or `InputError`.
    """

    def __init__(
        self, admission: AdmissionController, decode: Decode, examples: Sequence[Example]
    ) -> None:
        self._admission = admission
        self._decode = decode
        self._examples = examples

    async def ask(self, box: dict[str, Any], conversation: Conversation, *settings: Any) -> Updates:
        """Answer the content of the text box, `{"text": ..., "files": [paths]}`."""
        if conversation.answering.locked():
            return
        chat = ChatSettings(*settings)
        try:
            turn = self._new_turn(box["text"], box["files"], conversation, chat.language)
        except (ApiError, InputError) as error:
            show_error(error, chat.language)
            yield ChatUpdate(gr.update(value=box), conversation.display())
            return
        conversation.turns.append(turn)
        async with aclosing(self._answer(conversation, chat)) as updates:
            async for update in updates:
                yield update

    async def ask_example(
        self, event: gr.SelectData, conversation: Conversation, *settings: Any
    ) -> Updates:
        """Answer an example. Only its index comes from the browser."""
        example = self._examples[int(event.index)]
        box = {"text": example.question, "files": [str(path) for path in example.images]}
        async with aclosing(self.ask(box, conversation, *settings)) as updates:
            async for update in updates:
                yield update

    async def regenerate(self, conversation: Conversation, *settings: Any) -> Updates:
        """Replace the last answer."""
        if conversation.answering.locked():
            return
        chat = ChatSettings(*settings)
        if not conversation.turns:
            show_info("error_no_answer", chat.language)
            return
        async with aclosing(self._answer(conversation, chat)) as updates:
            async for update in updates:
                yield update

    async def stop(self, conversation: Conversation) -> None:
        """Stop the current answer, whose updates then end."""
        if conversation.stop is not None:
            conversation.stop()

    async def clear(self, conversation: Conversation) -> ChatUpdate:
        """Start a new conversation."""
        await self.stop(conversation)
        conversation.turns = []
        return ChatUpdate(gr.update(value=None), [])

    # -------------------------------------------------------------- one answer

    def _new_turn(
        self, question: str, files: list[str], conversation: Conversation, language: str
    ) -> Turn:
        limits = self._admission.limits
        if not question.strip():
            raise InputError(text("error_empty", language), ErrorCode.EMPTY_MESSAGE)
        images = len(files) + sum(len(turn.files) for turn in conversation.turns)
        if images > limits.max_images:
            raise ApiError(
                400,
                f"The conversation has {images} images; the limit is {limits.max_images}. "
                "Start a new conversation.",
                code="too_many_images",
            )
        if 2 * len(conversation.turns) + 1 > limits.max_messages:
            raise ApiError(
                400,
                f"The conversation has reached the limit of {limits.max_messages} messages. "
                "Start a new conversation.",
                code="too_many_messages",
            )
        length = sum(len(turn.question) + len(turn.answer) for turn in conversation.turns)
        check_text_length(length + len(question), self._admission.engine.context_length)
        return Turn(question, tuple(files))

    async def _load_image(self, file: Path, language: str) -> Image.Image:
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except FileNotFoundError as error:  # uploads are deleted after some hours
            message = text("error_file_expired", language, name=file.name)
            raise InputError(message, ErrorCode.FILE_NOT_FOUND) from error
        try:
            return await self._decode(data)
        except (ApiError, InputError) as error:
            reason = error_text(as_api_error(error), language)
            message = text("error_in_file", language, name=file.name, error=reason)
            raise InputError(message, ErrorCode.BROKEN_IMAGE) from error

    async def _answer(self, conversation: Conversation, chat: ChatSettings) -> Updates:
        """Answer the last turn. Without an answer, restore the previous state and the text box."""
        turn = conversation.turns[-1]
        previous = (turn.answer, turn.note)
        turn.answer = turn.note = ""
        box: dict[str, Any] = {}
        async with conversation.answering:
            try:
                started = gr.update(value=None, submit_btn=False, stop_btn=True)
                yield ChatUpdate(started, conversation.display())
                async with aclosing(self._generate(conversation, turn, chat)) as chunks:
                    last_update = 0.0
                    async for chunk in chunks:
                        turn.answer += chunk
                        if time.monotonic() - last_update > UPDATE_SECONDS:
                            yield ChatUpdate(gr.skip(), conversation.display())
                            last_update = time.monotonic()
                if not turn.answer.strip():
                    show_info("empty", chat.language)
            except ClientStopped:
                turn.note = text("stopped", chat.language)
            except Exception as error:  # shown to the visitor; unexpected ones are logged
                show_error(error, chat.language)
            finally:
                conversation.stop = None
                if not turn.answer.strip():
                    turn.answer, turn.note = previous
                if (
                    not turn.answer and turn in conversation.turns
                ):  # otherwise it was cleared meanwhile
                    conversation.turns.remove(turn)
                    box["value"] = {"text": turn.question, "files": list(turn.files)}
        finished = gr.update(submit_btn=True, stop_btn=False, **box)
        yield ChatUpdate(finished, conversation.display())

    async def _generate(
        self, conversation: Conversation, turn: Turn, chat: ChatSettings
    ) -> AsyncGenerator[str, None]:
        """The text of the answer in chunks.

        Raises:
            ClientStopped: The visitor stopped it.
            ApiError, InputError: As in the API.
        """
        options = self._sampling_options(chat)
        stopping = asyncio.Event()
        conversation.stop = stopping.set

        async def messages() -> list[Message]:
            if not turn.images:  # they are loaded already when an answer is regenerated
                files = [Path(file) for file in turn.files]
                images = [await self._load_image(file, chat.language) for file in files]
                turn.images = tuple(images)
            return conversation.messages()

        with self._admission.admit() as stream:
            await run_unless(stopping.wait(), stream.start(messages, options))

            def stop() -> None:
                stopping.set()
                stream.close()

            conversation.stop = stop
            while True:
                # It may have been stopped between the end of `start` and this point.
                chunk = None if stopping.is_set() else await stream.next()
                if stopping.is_set():
                    raise ClientStopped
                if chunk is None:
                    return
                if chunk.finish_reason == "length":
                    turn.note = text("truncated", chat.language)
                yield chunk.text

    def _sampling_options(self, chat: ChatSettings) -> dict[str, Any]:
        seed = chat.seed.strip()
        if seed and not (seed.isdecimal() and len(seed) <= MAX_SEED_DIGITS):
            raise InputError(text("error_seed", chat.language), ErrorCode.INVALID_VALUE)
        limit = self._admission.limits.max_completion_tokens
        options: dict[str, Any] = {
            "max_new_tokens": min(int(chat.max_new_tokens), limit),
            "temperature": chat.temperature,
            "seed": int(seed) if seed else None,
        }
        return options | ({"top_p": chat.top_p} if chat.temperature else {})
