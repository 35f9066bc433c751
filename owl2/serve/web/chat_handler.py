"""The event handlers of the chat: load the images, run the engine, update the page.

::

    text box ──ask──► Turn ──AdmissionController──► text chunks ──► updates of the page

The page and the API share the admission controller with its slots, queue and limits.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import Message, user_message
from owl2.serve.admission import (
    AdmissionController,
    ClientStopped,
    check_limits,
    current_client,
    run_unless,
)
from owl2.serve.errors import ApiError, as_api_error
from owl2.serve.image_decoder import ImageBudget
from owl2.serve.web.examples import Example
from owl2.serve.web.i18n import error_text, show_error, show_info, text

# Minimum time between two updates of an answer, each of which sends all rows of the chat.
UPDATE_SECONDS = 0.05

MAX_SEED_DIGITS = 9  # so that every seed is valid

WAITING = "<span class='waiting'>● ● ●</span>"

Decode = Callable[[bytes, ImageBudget], Awaitable[Image.Image]]


@dataclass
class Turn:
    """A question and its answer, as far as it is generated.

    Attributes:
        files: The uploaded image files, for display.
        images: The same images for the model; loaded when the answer starts.
        note: Shown below the answer, for example that it was stopped.
    """

    question: str
    files: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    answer: str = ""
    note: str = ""


@dataclass
class Conversation:
    """The turns of a visitor, stored in the server; the browser only displays them.

    A browser can therefore not change earlier answers or refer to files that were not uploaded.

    Attributes:
        answering: Locked while the last turn is being answered.
        stop: Set to stop that answer.
    """

    turns: list[Turn] = field(default_factory=list)
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def messages(self) -> list[Message]:
        """The messages for the engine, without the last answer."""
        messages: list[Message] = []
        for turn in self.turns:
            messages.append(user_message(turn.question, turn.images))
            messages.append({"role": "assistant", "content": turn.answer})
        return messages[:-1]

    def display(self) -> list[dict[str, Any]]:
        """Rows for gradio's Chatbot: images before their question, notes below their answer."""
        rows: list[dict[str, Any]] = []
        for turn in self.turns:
            rows += [{"role": "user", "content": {"path": file}} for file in turn.files]
            rows.append({"role": "user", "content": turn.question})
            is_last = turn is self.turns[-1]
            is_waiting = self.answering.locked() and is_last and not turn.answer
            note = f"<small class='note'>{turn.note}</small>" if turn.note else ""
            answer = WAITING if is_waiting else "\n\n".join(filter(None, (turn.answer, note)))
            rows.append({"role": "assistant", "content": answer})
        return rows


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
        decode: `SandboxedImageDecoder.decode`.
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
        conversation.stop.set()

    async def clear(self, conversation: Conversation) -> ChatUpdate:
        """Start a new conversation."""
        await self.stop(conversation)
        conversation.turns = []
        return ChatUpdate(gr.update(value=None), [])

    # -------------------------------------------------------------- one answer

    def _new_turn(
        self, question: str, files: list[str], conversation: Conversation, language: str
    ) -> Turn:
        if not (question.strip() or files):
            raise InputError(text("error_empty", language), ErrorCode.EMPTY_MESSAGE)
        turns = conversation.turns
        check_limits(
            self._admission.limits,
            self._admission.engine.context_length,
            messages=2 * len(turns) + 1,
            images=len(files) + sum(len(turn.files) for turn in turns),
            characters=len(question) + sum(len(turn.question) + len(turn.answer) for turn in turns),
        )
        return Turn(question if question.strip() else "", tuple(files))

    async def _load_image(self, file: Path, language: str, budget: ImageBudget) -> Image.Image:
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except FileNotFoundError as error:  # uploads are deleted after some hours
            message = text("error_file_expired", language, name=file.name)
            raise InputError(message, ErrorCode.FILE_NOT_FOUND) from error
        try:
            return await self._decode(data, budget)
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
            conversation.stop.clear()
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
                if not turn.answer.strip():
                    turn.answer, turn.note = previous
                # It is not among the turns if the conversation was cleared meanwhile.
                if not turn.answer and turn in conversation.turns:
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

        async def prompts() -> list[list[Message]]:
            if not turn.images:  # they are loaded already when an answer is regenerated
                budget = ImageBudget.of_request(self._admission.limits)
                turn.images = tuple(
                    [
                        await self._load_image(Path(file), chat.language, budget)
                        for file in turn.files
                    ]
                )
            return [conversation.messages()]

        current_client.set(f"visitor {id(conversation)}")
        with self._admission.admit() as stream:
            await run_unless(conversation.stop.wait(), stream.start(prompts, options))
            while True:
                chunk = await run_unless(conversation.stop.wait(), stream.next())
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
