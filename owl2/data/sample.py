"""The one thing that readers give and that training takes: a conversation with its images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import IMAGE_TOKEN, content_to_text, parse_messages

Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One conversation in transformers' message format, and where it came from.

    `messages`: `[{"role": "user" | "assistant", "content": str | [part, ...]}, ...]`; an image is
    a part such as `{"type": "image", "path": ...}` and stays unopened until the sample is used.
    `source`: the file and row, or the dataset and item, for whoever has to find it again.
    """

    messages: list[Message]
    source: str


@dataclass(frozen=True)
class Bad:
    """What stands in a Sample's place where a row is no sample, so that the others go on.

    `source` as a Sample's; `reason`: what is wrong, without the source; `code`: its kind.
    """

    source: str
    reason: str
    code: ErrorCode = ErrorCode.INVALID_FORMAT

    @classmethod
    def of(cls, source: str, error: InputError) -> "Bad":
        """The error that reading `source` raised."""
        return cls(source, str(error).removeprefix(f"{source}: "), error.code)

    @classmethod
    def row(cls, error: InputError) -> "Bad":
        """The error that taking a row raised, which begins with the row that it is about."""
        return cls.of(str(error).partition(": ")[0], error)

    def raised(self) -> InputError:
        """The error again, for whoever cannot go on without this row."""
        return InputError(f"{self.source}: {self.reason}", self.code)


def taken(samples: Sequence[Sample], place: int) -> Sample | Bad:
    """A sample, or what is wrong with its row."""
    try:
        return samples[place]
    except InputError as error:
        return Bad.row(error)


def checked(sample: Sample) -> Sample:
    """The sample, after a look at its messages; no image is opened.

    Raises:
        InputError: that begins with `source`; see `parse_messages`. Also where the last turn is
            not an answer, or a text marks another number of images than come with it.
    """
    try:
        conversation = parse_messages(sample.messages)
    except InputError as error:
        raise InputError(f"{sample.source}: {error}", error.code) from error
    if conversation.is_open:
        raise InputError(
            f"{sample.source}: the last turn is the user's; there is no answer to learn.",
            ErrorCode.INVALID_ROLE,
        )
    marked = sum(content_to_text(turn["content"]).count(IMAGE_TOKEN) for turn in conversation.turns)
    if marked != len(conversation.images):
        raise InputError(
            f"{sample.source}: the text marks {marked} images, and {len(conversation.images)} "
            "come with it; these must be the same.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    return sample
