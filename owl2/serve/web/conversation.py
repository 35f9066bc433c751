"""One visitor's conversation, kept in the server: what the browser shows is only a view of it.

So a browser cannot put words into the model's mouth, nor name a file that was not uploaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from owl2.processing.chat_template import Message, user_message

WAITING = "<span class='waiting'>● ● ●</span>"


@dataclass
class Turn:
    """A question and its answer, as far as it is there.

    Attributes:
        files: the images as they were uploaded, for showing.
        images: the same for the model; not opened before the answer begins.
        note: what is said below the answer, such as that it was stopped.
    """

    question: str
    files: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    answer: str = ""
    note: str = ""


@dataclass
class Conversation:
    """The turns so far.

    Attributes:
        busy: the last one is being answered.
        stop: ends that answer, while there is one.
    """

    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    stop: Callable[[], None] | None = None

    @property
    def images(self) -> int:
        """How many there are in all turns."""
        return sum(len(turn.files) for turn in self.turns)

    def messages(self) -> list[Message]:
        """For the engine: the turns, the last one without its answer."""
        messages: list[Message] = []
        for turn in self.turns:
            messages += [
                user_message(turn.question, turn.images),
                {"role": "assistant", "content": turn.answer},
            ]
        return messages[:-1]

    def shown(self) -> list[dict[str, Any]]:
        """For gradio's Chatbot: images before their question, notes below their answer."""
        rows: list[dict[str, Any]] = []
        for turn in self.turns:
            rows += [{"role": "user", "content": {"path": file}} for file in turn.files]
            rows.append({"role": "user", "content": turn.question})
            waits = self.busy and turn is self.turns[-1] and not turn.answer
            note = f"<small class='note'>{turn.note}</small>" if turn.note else ""
            answer = WAITING if waits else "\n\n".join(filter(None, (turn.answer, note)))
            rows.append({"role": "assistant", "content": answer})
        return rows
