"""A prompt and its answer as token ids, with the text of each token and the kind of each span."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from owl2.engine.scoring import encode_answer
from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import Message
from owl2.processing.prepared_prompt import PreparedPrompt
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
class TokenizedConversation:
    """A prompt of P tokens and the T token ids of its answer, without the end token.

    Attributes:
        prompt_texts: The text of each id; empty for an image's.
        answer_texts: The text of each id; joined, they are the answer.
    """

    prompt: PreparedPrompt
    answer: tuple[int, ...]
    prompt_texts: tuple[str, ...]
    answer_texts: tuple[str, ...]

    @classmethod
    def encode(
        cls,
        processor: Owl2Processor,
        messages: Sequence[Message],
        answer: str,
        pixel_values: torch.Tensor | None,
    ) -> "TokenizedConversation":
        """Tokenize as in training.

        Args:
            pixel_values: (N, 3, H, W), the images of the messages.

        Raises:
            InputError: As `parse_messages`; also an answer without tokens.
        """
        sample, begin, end = encode_answer(processor, messages, answer)
        tokenizer, image_id = processor.tokenizer, processor.image_token_id
        while end > begin and sample.ids[end - 1] == tokenizer.eos_token_id:
            end -= 1
        if begin == end:
            raise InputError(f"The answer {answer!r} has no tokens.", ErrorCode.EMPTY_MESSAGE)
        texts = [
            "" if id_ == image_id else sample.text[first:last]
            for id_, (first, last) in zip(sample.ids[:end], sample.offsets[:end], strict=True)
        ]
        for index, (own, following) in enumerate(pairwise(sample.offsets[:end])):
            if own == following:  # parts of one character
                texts[index] = ""
        starts = tokenizer.convert_ids_to_tokens(start_ids(tokenizer))
        if sample.offsets[: len(starts)] == [(0, 0)] * len(starts):
            texts[: len(starts)] = starts
        prompt = PreparedPrompt.from_ids(
            sample.ids[:begin], pixel_values, image_id, processor.num_image_tokens
        )
        return cls(prompt, tuple(sample.ids[begin:end]), tuple(texts[:begin]), tuple(texts[begin:]))

    @property
    def spans(self) -> tuple[Span, ...]:
        """Cover the P + T - 1 positions that are keys: no token attends to the last position."""
        spans: list[Span] = []
        position, length = 0, len(self.prompt.ids)
        for image, (start, end) in enumerate(self.prompt.image_spans):
            spans += [Span(position, start, "text"), Span(start, end, "image", image)]
            position = end
        spans.append(Span(position, length, "text"))
        spans.append(Span(length, length + len(self.answer) - 1, "answer"))
        return tuple(span for span in spans if span.end > span.start)
