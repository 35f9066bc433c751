"""The conversations of the page: stored in the server, displayed and kept by the browser."""

import asyncio
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import Message, user_message
from owl2.processing.video import VIDEO_SUFFIXES

WAITING = "<span class='waiting'>● ● ●</span>"

# Everything that Markdown and HTML could interpret, and spaces that Markdown would remove.
_MARKUP = re.compile(r"[\x00-\x1f!-/:-@\[-`{-~]|^ | $| (?=\s)|(?<=\s) ")


def plain_text(question: str) -> str:
    """Markdown that shows a question as the visitor typed it.

    The entities have seven digits: the page decodes this form when a conversation is copied.
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0]):07};", question)


class SavedFile(TypedDict):
    """An uploaded file, in the form in which gradio sends one."""

    path: str


class SavedTurn(TypedDict):
    """An answered turn. The browser keeps it for the case that the server is restarted."""

    question: str
    files: list[SavedFile]
    answer: str
    note: str


@dataclass
class Turn:
    """A question and its answer, as far as it is generated.

    Attributes:
        files: The uploaded images and videos. They are loaded for each answer: gradio keeps the
            conversations of thousands of visitors who have left.
        note: Shown below the answer, for example that it was stopped.
    """

    question: str
    files: tuple[str, ...] = ()
    answer: str = ""
    note: str = ""

    @property
    def images(self) -> list[str]:
        """The files that are images."""
        return [file for file in self.files if not is_video(file)]

    @property
    def videos(self) -> list[str]:
        """The files that are videos."""
        return [file for file in self.files if is_video(file)]


def is_video(file: str) -> bool:
    """Whether an upload is a video; an animated GIF is an image."""
    return file.lower().endswith(VIDEO_SUFFIXES)


@dataclass
class Conversation:
    """The turns of a visitor, stored in the server; the browser only displays them.

    A browser can therefore not change earlier answers or refer to files that were not uploaded.

    Attributes:
        answering: Locked while the last turn is being answered.
        stop: Set to stop that answer.
        editing: The text below the last answer while its question is edited in the text box. The
            next question then replaces that turn.
    """

    turns: list[Turn] = field(default_factory=list)
    editing: str = ""
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def messages(self, media: Sequence[Any]) -> list[Message]:
        """The messages for the engine, without the last answer.

        Args:
            media: The images, and the frames of each video, of all turns: images first in a turn.
        """
        unused = iter(media)
        messages: list[Message] = []
        for turn in self.turns:
            images = [next(unused) for _ in turn.images]
            messages.append(
                user_message(turn.question, images, [next(unused) for _ in turn.videos])
            )
            messages.append({"role": "assistant", "content": turn.answer})
        return messages[:-1]

    def display(self) -> list[dict[str, Any]]:
        """Rows for gradio's Chatbot: files before their question, notes below their answer."""
        rows: list[dict[str, Any]] = []
        for turn in self.turns:
            rows += [{"role": "user", "content": {"path": file}} for file in turn.files]
            if turn.question:
                rows.append({"role": "user", "content": plain_text(turn.question)})
            is_last = turn is self.turns[-1]
            is_waiting = self.answering.locked() and is_last and not turn.answer
            notes = [turn.note, self.editing if is_last else ""]
            notes = [f"<small class='note'>{html.escape(note)}</small>" for note in notes if note]
            answer = WAITING if is_waiting else "\n\n".join(filter(None, (turn.answer, *notes)))
            rows.append({"role": "assistant", "content": answer})
        return rows

    def save(self) -> list[SavedTurn]:
        """The answered turns, from which `restore` makes the same conversation."""
        return [
            SavedTurn(
                question=turn.question,
                files=[SavedFile(path=file) for file in turn.files],
                answer=turn.answer,
                note=turn.note,
            )
            for turn in self.turns
            if turn.answer
        ]

    def restore(self, memory: Any) -> None:
        """Restore the turns of a browser in a server that does not know the conversation.

        Args:
            memory: As from `save`. The caller has checked that the files are uploads.

        Raises:
            InputError: It has another form.
        """
        if self.turns or not memory:
            return
        try:
            turns = TypeAdapter(list[SavedTurn]).validate_python(memory)
        except ValidationError as error:
            message = "The copy of the conversation in the browser is invalid."
            raise InputError(message, ErrorCode.INVALID_FORMAT) from error
        for saved in turns:
            files = tuple(file["path"] for file in saved["files"])
            turn = Turn(saved["question"], files, answer=saved["answer"], note=saved["note"])
            self.turns.append(turn)
