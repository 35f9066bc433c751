"""A rendered conversation as ids with a loss mask, and its display on a terminal.

::

    text with <|image|>, answer spans ──encode_with_loss_mask──► ids, loss mask, offsets (S)

S tokens; an image takes K+1 of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from owl2.constants import IGNORE_INDEX
from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import Spans
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.token_rows import truncate_text
from owl2.processing.tokenizer import Offsets, Owl2Tokenizer, encode_with_offsets

LABEL_STYLE = "bold green"
PROMPT_STYLE = "dim"


@dataclass(frozen=True)
class EncodedConversation:
    """Ids of a rendered conversation.

    Attributes:
        loss_mask: Whether each id is a label.
        offsets: Start and end of each id in `text`; all K+1 ids of an image have its `<|image|>`.
    """

    text: str
    ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    offsets: Offsets = field(default_factory=list)

    def extend(self, ids: Sequence[int], offsets: Offsets, loss_mask: Sequence[bool]) -> None:
        """Append ids."""
        self.ids.extend(ids)
        self.offsets.extend(offsets)
        self.loss_mask.extend(loss_mask)

    def to_batch(self, image_token_id: int, max_length: int | None) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `mm_token_type_ids`, `labels`, all (1,S).

        Raises:
            InputError: An image is beyond `max_length`.
        """
        ids = truncate_text(self.ids, max_length or len(self.ids), image_token_id)
        input_ids, loss_mask = torch.tensor([ids]), torch.tensor([self.loss_mask[: len(ids)]])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == image_token_id).long(),
            "labels": input_ids.masked_fill(~loss_mask, IGNORE_INDEX),
        }

    def mask_of(self, attention_mask: Iterable[Any], truncation_side: str = "right") -> list[int]:
        """The loss mask, truncated and padded as a row (S) of `attention_mask`."""
        row = [bool(is_token) for is_token in attention_mask]
        start = len(self.ids) - sum(row) if truncation_side == "left" else 0
        mask = iter(self.loss_mask[start:])
        return [int(is_token and next(mask)) for is_token in row]


def encode_with_loss_mask(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Spans,
    start_ids: Sequence[int],
    image_ids: Sequence[int],
    has_loss: Sequence[bool] = (),
) -> EncodedConversation:
    """Tokenize `text`. Each segment between images is tokenized separately.

    Args:
        spans: Start and end of each answer in `text`, sorted. Tokens inside are labels.
        start_ids: Prepended, unless the text begins with them.
        image_ids: The ids of an image.
        has_loss: Whether the tokens of each answer are labels; default: all are.

    Raises:
        InputError: The tokenizer gives no offsets, a token crosses the border of a span, or an
            answer without labels has no span.
    """
    sample = EncodedConversation(text)
    position = 0
    for index, segment in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            span = (position, position + len(IMAGE_TOKEN))
            sample.extend(image_ids, [span] * len(image_ids), [False] * len(image_ids))
            position = span[1]
        ids, offsets, loss_mask = _encode_segment(tokenizer, segment, position, spans)
        if index == 0 and ids[: len(start_ids)] != list(start_ids):
            sample.extend(start_ids, [(0, 0)] * len(start_ids), [False] * len(start_ids))
        sample.extend(ids, offsets, loss_mask)
        position += len(segment)
    if not all(has_loss):
        if len(has_loss) != len(spans):
            raise InputError(
                f"The chat template marks {len(spans)} of {len(has_loss)} answers, so that those "
                "without loss are unknown.",
                ErrorCode.UNSUPPORTED,
            )
        without = [span for span, is_label in zip(spans, has_loss, strict=True) if not is_label]
        for index, (first, _) in enumerate(sample.offsets):
            if any(start <= first < end for start, end in without):
                sample.loss_mask[index] = False
    return sample


def render_mask(sample: EncodedConversation, start: str, num_image_tokens: int) -> Text:
    """The model's input for a terminal: labels bright, other tokens dim, images abbreviated.

    Args:
        start: Text for start ids that the sample's text does not contain (`<s>`).
    """
    shown = Text()
    if sample.offsets and sample.offsets[0] == (0, 0) and not sample.text.startswith(start):
        shown.append(start, PROMPT_STYLE)
    position = 0
    tokens = zip(sample.loss_mask, sample.offsets, strict=True)
    for is_label, run in groupby(tokens, key=lambda token: token[0]):
        end = max(position, *(span[1] for _, span in run))
        segment = sample.text[position:end].replace(
            IMAGE_TOKEN, f"{IMAGE_TOKEN}×{num_image_tokens}"
        )
        shown.append(segment, LABEL_STYLE if is_label else PROMPT_STYLE)
        position = end
    return shown


def _encode_segment(
    tokenizer: PreTrainedTokenizerBase, segment: str, position: int, spans: Spans
) -> tuple[list[int], Offsets, list[bool]]:
    """Ids, offsets and loss mask of the text between two images, which starts at `position`.

    If a token crosses the border of an answer, such as "\\n\\n" of a line break in the template and
    one in the answer, the text is split at the borders. At inference the prompt ends there and is
    tokenized separately.
    """
    borders = {border - position for span in spans for border in span}
    for cuts in ([], sorted(border for border in borders if 0 < border < len(segment))):
        ids: list[int] = []
        offsets: Offsets = []
        for start, end in pairwise([0, *cuts, len(segment)]):
            part_ids, part_offsets = encode_with_offsets(tokenizer, segment[start:end])
            ids += part_ids
            shift = position + start
            offsets += [(shift + first, shift + last) for first, last in part_offsets]
        loss_mask = _mask(offsets, spans)
        if loss_mask is not None:
            break
        if isinstance(tokenizer, Owl2Tokenizer):
            raise InputError(
                "An answer starts or ends inside a token, and SentencePiece would add a space if "
                f"it were tokenized separately: {segment!r:.200}. Strip the white space of the "
                "answer, or let the chat template write a space before it.",
                ErrorCode.INVALID_FORMAT,
            )
    return ids, offsets, loss_mask or []


def _mask(offsets: Offsets, spans: Spans) -> list[bool] | None:
    """Whether each token starts in a span; None if a token crosses a border. Both are sorted."""
    mask = []
    index = 0
    for start, end in offsets:
        while index < len(spans) and start >= spans[index][1]:
            index += 1
        inside = index < len(spans) and start >= spans[index][0]
        if index < len(spans) and end > spans[index][1 if inside else 0]:
            return None
        mask.append(inside)
    return mask
