"""The event handlers of the chat: load the files, run the engine, update the page.

::

    text box ──ask──► Turn ──AdmissionController──► text chunks ──► updates of the page

The page and the API share the admission controller with its slots, queue and limits.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import Message
from owl2.serve.admission import AdmissionController, ClientStopped, run_unless
from owl2.serve.errors import ApiError, as_api_error
from owl2.serve.image_decoder import ImageBudget, SandboxedImageDecoder
from owl2.serve.request_limits import check_limits
from owl2.serve.web.conversation import Conversation, Turn, is_video
from owl2.serve.web.examples import Example
from owl2.serve.web.i18n import error_text, show_error, show_info, text

# Minimum time between two updates of an answer, each of which sends all rows of the chat.
UPDATE_SECONDS = 0.05

MAX_SEED_DIGITS = 9  # so that every seed is valid

# Seconds until an answer whose connection was lost has ended.
RECOVERY_SECONDS = 5.0

UNCHANGED: Any = gr.skip()  # an output that an update does not change


class ChatUpdate(NamedTuple):
    """Outputs of a chat event: the text box, all rows of the chat, and `Conversation.save`."""

    box: Any
    rows: list[dict[str, Any]]
    memory: Any = UNCHANGED


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
    """The event handlers of the chat tab."""

    def __init__(
        self,
        admission: AdmissionController,
        decoder: SandboxedImageDecoder,
        examples: Sequence[Example],
    ) -> None:
        self._admission = admission
        self._decoder = decoder
        self._examples = examples

    async def ask(
        self,
        box: dict[str, Any],
        conversation: Conversation,
        memory: Any,
        *settings: Any,
        rejected: Any = UNCHANGED,
    ) -> Updates:
        """Answer the content of the text box, `{"text": ..., "files": [paths]}`.

        Args:
            rejected: The text box after an error. Default: as it is. The question is still in it,
                and the visitor may have changed it meanwhile.
        """
        if conversation.answering.locked():
            return
        chat = ChatSettings(*settings)
        conversation.restore(memory)
        replaced = conversation.turns.pop() if conversation.editing else None
        try:
            turn = self._new_turn(box["text"], box["files"], conversation, chat.language)
        except (ApiError, InputError) as error:
            conversation.turns += [replaced] if replaced else []
            show_error(error, chat.language)
            yield ChatUpdate(rejected, conversation.display())
            return
        conversation.turns.append(turn)
        async with aclosing(self._answer(conversation, chat, replaced)) as updates:
            async for update in updates:
                yield update

    async def ask_example(
        self, event: gr.SelectData, conversation: Conversation, memory: Any, *settings: Any
    ) -> Updates:
        """Answer an example. Only its index comes from the browser."""
        example = self._examples[int(event.index)]
        box = {"text": example.question, "files": [str(path) for path in example.images]}
        updates = self.ask(box, conversation, memory, *settings, rejected=gr.update(value=box))
        async with aclosing(updates):
            async for update in updates:
                yield update

    async def regenerate(self, conversation: Conversation, memory: Any, *settings: Any) -> Updates:
        """Replace the last answer."""
        if conversation.answering.locked():
            return
        chat = ChatSettings(*settings)
        conversation.restore(memory)
        if not conversation.turns:
            show_info("error_no_answer", chat.language)
            return
        async with aclosing(self._answer(conversation, chat)) as updates:
            async for update in updates:
                yield update

    async def edit(self, conversation: Conversation, memory: Any, language: str) -> ChatUpdate:
        """Move the last question to the text box, or cancel that."""
        conversation.restore(memory)
        box = UNCHANGED
        if conversation.editing:
            conversation.editing, box = "", gr.update(value=None)
        elif not conversation.turns:
            show_info("error_no_answer", language)
        elif not conversation.answering.locked():
            conversation.editing, turn = text("editing", language), conversation.turns[-1]
            box = gr.update(value={"text": turn.question, "files": list(turn.files)})
        return ChatUpdate(box, conversation.display())

    async def recover(
        self, box: dict[str, Any] | None, conversation: Conversation, memory: Any
    ) -> ChatUpdate:
        """Show the conversation again after the connection was lost, or the page loaded again.

        Args:
            box: The question that was being answered; it returns to the text box if it has no
                answer.
        """
        await self.stop(conversation)
        with suppress(TimeoutError):
            async with asyncio.timeout(RECOVERY_SECONDS), conversation.answering:
                pass
        last = conversation.turns[-1] if conversation.turns else None
        conversation.restore(memory)  # without the question that was being answered
        value: dict[str, Any] = {}
        if box and not (last and (last.question, list(last.files)) == (box["text"], box["files"])):
            value["value"] = box
        ready = gr.update(submit_btn=True, stop_btn=False, **value)
        return ChatUpdate(ready, conversation.display(), conversation.save())

    async def stop(self, conversation: Conversation) -> None:
        """Stop the current answer, whose updates then end."""
        conversation.stop.set()

    async def clear(self, conversation: Conversation) -> ChatUpdate:
        """Start a new conversation."""
        await self.stop(conversation)
        conversation.turns, conversation.editing = [], ""
        return ChatUpdate(gr.update(value=None), [], [])

    # -------------------------------------------------------------- one answer

    def _new_turn(
        self, question: str, files: list[str], conversation: Conversation, language: str
    ) -> Turn:
        if not (question.strip() or files):
            raise InputError(text("error_empty", language), ErrorCode.EMPTY_MESSAGE)
        turn = Turn(question if question.strip() else "", tuple(files))
        turns = [*conversation.turns, turn]
        check_limits(
            self._admission.limits,
            self._admission.engine.context_length,
            messages=2 * len(turns) - 1,
            images=sum(len(turn.images) for turn in turns),
            videos=sum(len(turn.videos) for turn in turns),
            characters=sum(len(turn.question) + len(turn.answer) for turn in turns),
            image_tokens=self._admission.engine.processor.num_image_tokens,
        )
        return turn

    async def load_files(self, conversation: Conversation, language: str) -> list[Any]:
        """The images, and the frames of each video, of all turns, as the model sees them.

        Raises:
            InputError: A file has expired, or is not a valid image or video.
        """
        budget = ImageBudget.of_request(self._admission.limits)
        files = [file for turn in conversation.turns for file in (*turn.images, *turn.videos)]
        return [await self._load(Path(file), language, budget) for file in files]

    async def _load(self, file: Path, language: str, budget: ImageBudget) -> Any:
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except FileNotFoundError as error:  # uploads are deleted after some hours
            message = text("error_file_expired", language, name=file.name)
            raise InputError(message, ErrorCode.FILE_NOT_FOUND) from error
        try:
            if is_video(file.name):
                return await self._decoder.decode_video(data, budget)
            return await self._decoder.decode(data, budget)
        except (ApiError, InputError) as error:
            reason = error_text(as_api_error(error), language)
            message = text("error_in_file", language, name=file.name, error=reason)
            raise InputError(message, ErrorCode.BROKEN_IMAGE) from error

    async def _answer(
        self, conversation: Conversation, chat: ChatSettings, replaced: Turn | None = None
    ) -> Updates:
        """Answer the last turn. Without an answer, restore the previous state and the text box.

        Args:
            replaced: The turn before its question was edited.
        """
        turn, conversation.editing = conversation.turns[-1], ""
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
                            yield ChatUpdate(UNCHANGED, conversation.display())
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
                    conversation.turns += [replaced] if replaced else []
                    box["value"] = {"text": turn.question, "files": list(turn.files)}
        finished = gr.update(submit_btn=True, stop_btn=False, **box)
        yield ChatUpdate(finished, conversation.display(), conversation.save())

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
            media = await self.load_files(conversation, chat.language)
            return [conversation.messages(media)]

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
