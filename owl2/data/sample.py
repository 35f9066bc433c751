"""`Sample`: one conversation with its images, which every dataset returns."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from owl2.constants import LEVELS
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.processing.message_parts import TOKENS, content_to_text
from owl2.processing.messages import parse_messages

Message = dict[str, Any]
# Keys of a row about opinion scores (Model family §3.1). The first three are read.
OPINION_KEYS = ("level_probs", "gt_score", "std", "level_probs_org", "gt_score_norm", "std_norm")


@dataclass(frozen=True)
class OpinionLabel:
    """The opinions about an image, for the losses of scoring models (Model family §3.1).

    Attributes:
        level_probs: Probabilities of the five `LEVELS`.
        gt_score, std: Mean and standard deviation of the opinions, in the range of the dataset.
    """

    level_probs: tuple[float, ...]
    gt_score: float
    std: float

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "OpinionLabel | None":
        """The opinions in a row; None for a row without ``level_probs``.

        Raises:
            InputError: A value is missing, not a number or negative.
        """
        probabilities = row.get("level_probs")
        if probabilities is None:
            return None
        is_list = isinstance(probabilities, Sequence) and len(probabilities) == len(LEVELS)
        values: list[Any] = [None]
        if is_list:
            values = [*probabilities, row.get("gt_score"), row.get("std")]
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise InputError(
                f"'level_probs' must be {len(LEVELS)} numbers, with a number each under 'gt_score' "
                "and 'std'",
                ErrorCode.INVALID_TYPE,
            )
        if min(*probabilities, row["std"]) < 0:
            raise InputError("'level_probs' and 'std' cannot be negative", ErrorCode.INVALID_VALUE)
        return cls(tuple(probabilities), row["gt_score"], row["std"])


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: transformers' message format,
            `[{"role": "user" | "assistant", "content": str | [part, ...]}, ...]`, after an optional
            system message. An image is a part such as `{"type": "image", "path": ...}`, a video
            `{"type": "video", "path": ...}`. They are not opened before the sample is encoded. An
            answer with `"loss": False` has no labels.
        source: The file and row, or the dataset and item, for error messages.
        unused_keys: Keys of the row that were not read.
        opinion: The opinion score of the image; used by the losses of scoring models only.
        is_description: Beside rows with an opinion score, this one is trained without.
    """

    messages: list[Message]
    source: str
    unused_keys: tuple[str, ...] = ()
    opinion: OpinionLabel | None = None
    is_description: bool = False


@dataclass(frozen=True)
class InvalidSample:
    """Replaces a `Sample` that cannot be used, so that a stream of samples can continue.

    Attributes:
        source: As in `Sample`.
        reason: The error message without the source.
        code: The code of the error.
    """

    source: str
    reason: str
    code: ErrorCode = ErrorCode.INVALID_FORMAT

    @classmethod
    def from_error(cls, source: str, error: InputError) -> "InvalidSample":
        """The error that reading the row `source` raised."""
        return cls(source, str(error).removeprefix(f"{source}: "), error.code)

    def to_error(self) -> InputError:
        """The error, for callers that cannot continue without this sample."""
        return InputError(f"{self.source}: {self.reason}", self.code)


@dataclass(frozen=True)
class SkippedRows:
    """`count` items that a converter skipped; `reason` names them in the plural."""

    reason: str
    count: int = 1


class RowDataset(Sequence[Sample]):
    """A dataset with random access. A row is read when it is accessed.

    Accessing an invalid row raises `InputError`; its message starts with the source of the row.
    """

    @abstractmethod
    def source(self, index: int) -> str:
        """The file and the row at `index`, for messages."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample at `index`, which is in `range(len(self))`."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        rows = range(len(self))[index]
        return self.read(rows) if isinstance(rows, int) else [self.read(row) for row in rows]


def get_or_invalid(samples: Sequence[Sample], index: int) -> Sample | InvalidSample:
    """The sample at `index`, or the error of its row."""
    try:
        return samples[index]
    except InputError as error:
        source = samples.source(index) if isinstance(samples, RowDataset) else f"sample {index}"
        return InvalidSample.from_error(source, error)


def validated(sample: Sample) -> Sample:
    """The same sample, after a check of its messages. Images are not opened.

    Raises:
        InputError: Starts with `sample.source`. The messages are not valid (see `parse_messages`),
            the last turn is not an answer, or the numbers of image and video placeholders in the
            text differ from those of images and videos.
    """
    with error_prefix(f"{sample.source}: "):
        conversation = parse_messages(sample.messages)
        if conversation.is_open:
            raise InputError(
                "the last turn is a user turn; training needs an answer after it.",
                ErrorCode.INVALID_ROLE,
            )
        texts = "".join(content_to_text(turn["content"]) for turn in conversation.turns)
        for kind, sources in (("image", conversation.images), ("video", conversation.videos)):
            if (placeholders := texts.count(TOKENS[kind])) != len(sources):
                raise InputError(
                    f"the text has {placeholders} {kind} placeholders, but the sample has "
                    f"{len(sources)} {kind}s.",
                    ErrorCode.IMAGE_COUNT_MISMATCH,
                )
    return sample
