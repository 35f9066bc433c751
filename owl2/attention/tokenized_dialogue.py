"""A prompt and its answer as token ids, with the text of each token and the kind of each span."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from owl2.engine.scoring import encode_answer
from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import Message
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import start_ids


@dataclass(frozen=True)
class Span:
    """Positions `start` to `end` (exclusive) of the sequence, all of one kind.

    Attributes:
        image: The index of the image, from 0; None unless the kind is "image".
    """

    start: int
    end: int
    kind: Literal["text", "image", "answer"]
    image: int | None = None


@dataclass(frozen=True)
class TokenizedDialogue:
    """P token ids of a prompt and T of its answer, without the end token.

    Attributes:
        prompt_texts: The text of each id; empty for an image's.
        answer_texts: The text of each id; joined, they are the answer.
        spans: Cover the P + T - 1 positions that are keys: no token attends to the last position.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    prompt_texts: tuple[str, ...]
    answer_texts: tuple[str, ...]
    spans: tuple[Span, ...]

    @classmethod
    def encode(
        cls, processor: Owl2Processor, messages: Sequence[Message], answer: str
    ) -> "TokenizedDialogue":
        """Tokenize as in training.

        Raises:
            InputError: As `parse_messages`; also an answer without tokens.
        """
        sample, begin, end = encode_answer(processor, messages, answer)
        tokenizer = processor.tokenizer
        while end > begin and sample.ids[end - 1] == tokenizer.eos_token_id:
            end -= 1
        if begin == end:
            raise InputError(f"The answer {answer!r} has no tokens.", ErrorCode.EMPTY_MESSAGE)
        texts = [
            "" if id_ == processor.image_token_id else sample.text[first:last]
            for id_, (first, last) in zip(sample.ids[:end], sample.offsets[:end], strict=True)
        ]
        starts = tokenizer.convert_ids_to_tokens(start_ids(tokenizer))
        if sample.offsets[: len(starts)] == [(0, 0)] * len(starts):
            texts[: len(starts)] = starts
        ids = tuple(sample.ids[:end])
        return cls(
            ids[:begin],
            ids[begin:],
            tuple(texts[:begin]),
            tuple(texts[begin:]),
            _spans(ids[:begin], len(ids) - 1, processor),
        )


def _spans(prompt: Sequence[int], positions: int, processor: Owl2Processor) -> tuple[Span, ...]:
    spans: list[Span] = []
    position = images = 0
    for is_image, run in groupby(prompt, key=lambda id_: id_ == processor.image_token_id):
        end = position + len(list(run))
        while is_image and position < end:  # adjacent images are one run
            spans.append(Span(position, position + processor.num_image_tokens, "image", images))
            position, images = spans[-1].end, images + 1
        if position < end:
            spans.append(Span(position, end, "text"))
        position = end
    if positions > position:
        spans.append(Span(position, positions, "answer"))
    return tuple(spans)
