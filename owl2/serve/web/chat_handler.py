"""What happens when somebody asks: images are decoded, the engine answers, the view grows.

::

    box ──ask──► Turn ──AdmissionController──► pieces ──► views of the box and the conversation

The page stands at the same admission as the API: its places, queue and limits of time are one.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from owl2.errors import InputError
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
from owl2.serve.web.i18n import error_text, text
from owl2.serve.web.notify import note, warn

# Between two views of a growing answer: an eye sees no more, and each view is sent anew.
VIEW_SECONDS = 0.05

SEED_DIGITS = 9  # all such numbers are seeds

Decode = Callable[[bytes], Awaitable[Image.Image]]


class View(NamedTuple):
    """What the browser is told: changes of the box to write in, and all rows of the chat."""

    box: Any
    chat: list[dict[str, Any]]


Views = AsyncGenerator[View, None]


class Settings(NamedTuple):
    """How to answer, as the page has it.

    Attributes:
        language: of what the page says; the model answers in the question's.
        seed: digits, or nothing.
    """

    language: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: str


class Asking:
    """The page's side of the admission.

    Args:
        decode: an image's file to an RGB image; raises `ApiError` or `InputError`.
    """

    def __init__(
        self, admission: AdmissionController, decode: Decode, examples: Sequence[Example]
    ) -> None:
        self.admission = admission
        self._decode = decode
        self._examples = examples

    async def ask(self, given: dict[str, Any], talk: Conversation, *settings: Any) -> Views:
        """Take what is in the box, `{"text": ..., "files": [paths]}`, and answer it."""
        if talk.busy:
            return
        how = Settings(*settings)
        try:
            turn = self._turn(given["text"], given["files"], talk, how.language)
        except (ApiError, InputError) as error:
            warn(error, how.language)
            yield View(gr.update(value=given), talk.shown())
            return
        talk.turns.append(turn)
        async with aclosing(self._answer(talk, how)) as views:
            async for view in views:
                yield view

    async def ask_example(self, event: gr.SelectData, talk: Conversation, *settings: Any) -> Views:
        """The same for an example, of which the browser gives the number only."""
        example = self._examples[int(event.index)]
        given = {"text": example.question, "files": [str(path) for path in example.images]}
        async with aclosing(self.ask(given, talk, *settings)) as views:
            async for view in views:
                yield view

    async def again(self, talk: Conversation, *settings: Any) -> Views:
        """Another answer to the last question."""
        if talk.busy:
            return
        how = Settings(*settings)
        if not talk.turns:
            note("error_no_answer", how.language)
            return
        async with aclosing(self._answer(talk, how)) as views:
            async for view in views:
                yield view

    async def stop(self, talk: Conversation) -> None:
        """End the answer that is being made; its views end by themselves then."""
        if talk.stop is not None:
            talk.stop()

    async def clear(self, talk: Conversation) -> View:
        """A new conversation."""
        await self.stop(talk)
        talk.turns = []
        return View(gr.update(value=None), [])

    # -------------------------------------------------------------- parts

    def _turn(self, question: str, files: list[str], talk: Conversation, language: str) -> Turn:
        limits = self.admission.limits
        if not question.strip():
            raise InputError(text("error_empty", language))
        images = talk.images + len(files)
        if images > limits.max_images:
            raise ApiError(
                400,
                f"There are {images} images in this conversation; the limit is "
                f"{limits.max_images}. Begin a new one.",
                code="too_many_images",
            )
        if 2 * len(talk.turns) + 1 > limits.max_messages:
            raise ApiError(
                400,
                f"A conversation has {limits.max_messages} messages at most. Begin a new one.",
                code="too_many_messages",
            )
        said = sum(len(turn.question) + len(turn.answer) for turn in talk.turns)
        check_text_length(said + len(question), self.admission.engine.context_length)
        return Turn(question, tuple(files))

    async def _image(self, file: Path, language: str) -> Image.Image:
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except FileNotFoundError as error:  # it was uploaded long ago
            raise InputError(text("error_file_gone", language, name=file.name)) from error
        try:
            return await self._decode(data)
        except (ApiError, InputError) as error:
            reason = error_text(as_api_error(error), language)
            raise InputError(
                text("error_in_file", language, name=file.name, error=reason)
            ) from error

    async def _answer(self, talk: Conversation, how: Settings) -> Views:
        """Answer the last turn. Where nothing comes, all is as before, the question in the box."""
        turn = talk.turns[-1]
        before = (turn.answer, turn.note)
        turn.answer = turn.note = ""
        talk.busy = True
        box: dict[str, Any] = {}
        try:
            yield View(gr.update(value=None, submit_btn=False, stop_btn=True), talk.shown())
            async with aclosing(self._pieces(talk, turn, how)) as pieces:
                seen = 0.0
                async for piece in pieces:
                    turn.answer += piece
                    if time.monotonic() - seen > VIEW_SECONDS:
                        yield View(gr.skip(), talk.shown())
                        seen = time.monotonic()
            if not turn.answer.strip():
                note("empty", how.language)
        except ClientStopped:
            turn.note = text("stopped", how.language)
        except Exception as error:  # what is our own code is logged there, and here it is said
            warn(error, how.language)
        finally:
            talk.busy, talk.stop = False, None
            if not turn.answer.strip():
                turn.answer, turn.note = before
            if not turn.answer and turn in talk.turns:  # else it was cleared meanwhile
                talk.turns.remove(turn)
                box["value"] = {"text": turn.question, "files": list(turn.files)}
        yield View(gr.update(submit_btn=True, stop_btn=False, **box), talk.shown())

    async def _pieces(
        self, talk: Conversation, turn: Turn, how: Settings
    ) -> AsyncGenerator[str, None]:
        """The answer's text as it is generated.

        Raises:
            ClientStopped: The visitor stopped it.
            ApiError, InputError: As in the API.
        """
        options = self._options(how)
        stopping = asyncio.Event()
        talk.stop = stopping.set

        async def messages() -> list[Message]:
            if not turn.images:  # otherwise it is answered again
                images = [await self._image(Path(file), how.language) for file in turn.files]
                turn.images = tuple(images)
            return talk.messages()

        with self.admission.admit() as stream:
            await run_unless(stopping.wait(), stream.start(messages, options))

            def stop() -> None:
                stopping.set()
                stream.close()

            talk.stop = stop
            while True:
                piece = await stream.next()
                if stopping.is_set():
                    raise ClientStopped
                if piece is None:
                    return
                if piece.finish_reason == "length":
                    turn.note = text("cut", how.language)
                yield piece.text

    def _options(self, how: Settings) -> dict[str, Any]:
        seed = how.seed.strip()
        if seed and not (seed.isdecimal() and len(seed) <= SEED_DIGITS):
            raise InputError(text("error_seed", how.language))
        options: dict[str, Any] = {
            "max_new_tokens": min(
                int(how.max_new_tokens), self.admission.limits.max_completion_tokens
            ),
            "temperature": how.temperature,
            "seed": int(seed) if seed else None,
        }
        return options | ({"top_p": how.top_p} if how.temperature else {})
