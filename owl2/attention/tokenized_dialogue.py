"""A prompt and its answer as tokens, each with its text, and which of them are what."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from owl2.errors import InputError
from owl2.processing.chat_template import Message, parse_messages, render_with_answers
from owl2.processing.loss_mask import encode_with_loss_mask
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import start_ids

Kind = Literal["text", "image", "answer"]


@dataclass(frozen=True)
class Span:
    """Positions `start` to `end` (not included) of the sequence, all of one kind.

    Attributes:
        image: of kind "image", which one, from 0.
    """

    start: int
    end: int
    kind: Kind
    image: int | None = None


@dataclass(frozen=True)
class Script:
    """P ids of a prompt and T of its answer, whose end token is left out.

    Attributes:
        prompt_texts: of each id; empty for an image's.
        answer_texts: of each id; joined, they are the answer.
        spans: of the P + T - 1 positions that are looked at: nothing looks at the last one.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    prompt_texts: tuple[str, ...]
    answer_texts: tuple[str, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, processor: Owl2Processor, messages: Sequence[Message], answer: str) -> "Script":
        """Written as training would write it.

        Raises:
            InputError: see `parse_messages`.
        """
        conversation = parse_messages([*messages, {"role": "assistant", "content": answer}])
        tokenizer = processor.tokenizer
        text, answers = render_with_answers(
            conversation, str(processor.chat_template), tokenizer.special_tokens_map
        )
        image_ids = [processor.image_token_id] * processor.num_image_tokens
        sample = encode_with_loss_mask(tokenizer, text, answers, start_ids(tokenizer), image_ids)
        end = len(sample.ids)
        # A template may write something after the end token, which nobody answered.
        while end and (
            not sample.loss_mask[end - 1] or sample.ids[end - 1] == tokenizer.eos_token_id
        ):
            end -= 1
        begin = end
        while begin and sample.loss_mask[begin - 1]:
            begin -= 1
        if begin == end:
            raise InputError(f"The answer {answer!r} has no tokens to look at.")
        starts = tokenizer.convert_ids_to_tokens(start_ids(tokenizer))
        texts = [
            "" if id_ == processor.image_token_id else text[slice(*place)]
            for id_, place in zip(sample.ids[:end], sample.offsets[:end], strict=True)
        ]
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
    place = 0
    images = 0
    for is_image, run in groupby(prompt, key=lambda id_: id_ == processor.image_token_id):
        length = len(list(run))
        # Images that follow each other are one run.
        step = processor.num_image_tokens if is_image else length
        for start in range(place, place + length, step):
            if is_image:
                spans.append(Span(start, start + step, "image", images))
                images += 1
            else:
                spans.append(Span(start, start + step, "text"))
        place += length
    if positions > place:
        spans.append(Span(place, positions, "answer"))
    return tuple(spans)
