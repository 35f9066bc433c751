"""The conversation of one visitor, stored in the server; the browser only displays it.

A browser can therefore not change earlier answers or refer to files that were not uploaded.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from owl2.processing.chat_template import Message, user_message

WAITING = "<span class='waiting'>● ● ●</span>"


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
    """The turns of a conversation.

    Attributes:
        answering: Locked while the last turn is being answered.
        stop: Stops that answer.
    """

    turns: list[Turn] = field(default_factory=list)
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)
    stop: Callable[[], None] | None = None

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
