"""One rendering → ids, and which of them are learned; and how that looks on a terminal.

::

    text with <|image|>, spans of the answers ──encode_with_loss_mask─► ids, mask, offsets (S)

S tokens, in which an image takes K+1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from owl2.errors import InputError
from owl2.processing.chat_template import IMAGE_TOKEN, Spans
from owl2.processing.tokenizer import Offsets, Owl2Tokenizer, encode_with_offsets

LABEL_STYLE = "bold green"
PROMPT_STYLE = "dim"


@dataclass(frozen=True)
class EncodedConversation:
    """A rendered conversation as ids, each with whether it is learned and where it stands in
    `text`.

    All K+1 ids of an image have the offsets of its `<|image|>`. `image_ends`: how many ids there
    are up to the end of each image.
    """

    text: str
    ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    offsets: Offsets = field(default_factory=list)
    image_ends: list[int] = field(default_factory=list)


def encode_with_loss_mask(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Spans,
    start_ids: Sequence[int],
    image_ids: Sequence[int],
) -> EncodedConversation:
    """`text` → ids: pieces between images each on their own, an image as `image_ids`.

    `start_ids` go before it, unless the text writes them itself. A token is learned if it lies in
    one of `spans` (sorted, in characters of `text`).

    Raises `InputError` if the tokenizer gives no offsets, or has a token that is half in a span.
    """
    sample = EncodedConversation(text)
    position = 0
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            place = (position, position + len(IMAGE_TOKEN))
            _extend(sample, image_ids, [place] * len(image_ids), [False] * len(image_ids))
            sample.image_ends.append(len(sample.ids))
            position = place[1]
        ids, offsets, learned = _encode_piece(tokenizer, piece, position, spans)
        if number == 0 and ids[: len(start_ids)] != list(start_ids):
            _extend(sample, start_ids, [(0, 0)] * len(start_ids), [False] * len(start_ids))
        _extend(sample, ids, offsets, learned)
        position += len(piece)
    return sample


def render_mask(sample: EncodedConversation, start: str, num_image_tokens: int) -> Text:
    """What the model gets, for a terminal: learned tokens bright, the rest dim, an image in short.

    `start`: how to write ids that stand for no text of the sample (`<s>`).
    """
    shown = Text()
    if sample.offsets and sample.offsets[0] == (0, 0) and not sample.text.startswith(start):
        shown.append(start, PROMPT_STYLE)
    position = 0
    tokens = zip(sample.loss_mask, sample.offsets, strict=True)
    for learned, run in groupby(tokens, key=lambda token: token[0]):
        end = max(place[1] for _, place in run)
        piece = sample.text[position : max(position, end)]
        piece = piece.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN}×{num_image_tokens}")
        shown.append(piece, LABEL_STYLE if learned else PROMPT_STYLE)
        position = max(position, end)
    return shown


def _extend(
    sample: EncodedConversation, ids: Sequence[int], offsets: Offsets, learned: list[bool]
) -> None:
    sample.ids.extend(ids)
    sample.offsets.extend(offsets)
    sample.loss_mask.extend(learned)


def _encode_piece(
    tokenizer: PreTrainedTokenizerBase, piece: str, position: int, spans: Spans
) -> tuple[list[int], Offsets, list[bool]]:
    """The text between two images, which begins at `position`."""
    ids, offsets = encode_with_offsets(tokenizer, piece)
    offsets = [(position + begin, position + end) for begin, end in offsets]
    learned = _mask(offsets, spans)
    if learned is not None:
        return ids, offsets, learned
    # A token across the edge of an answer ("\n\n" of a format's line break and the answer's own).
    # When the model answers, the prompt ends at that edge and was tokenised alone: so do it here
    # too.
    if isinstance(tokenizer, Owl2Tokenizer):
        raise InputError(
            "An answer begins or ends in the middle of a token, and SentencePiece would put a "
            f"space before it if it were tokenised alone: {piece!r:.200}. Strip the answer's white "
            "space, or let the chat template write a space before it."
        )
    edges = sorted({edge - position for span in spans for edge in span})
    cuts = [0, *(edge for edge in edges if 0 < edge < len(piece)), len(piece)]
    ids, offsets = [], []
    for begin, end in pairwise(cuts):
        part_ids, part_offsets = encode_with_offsets(tokenizer, piece[begin:end])
        ids += part_ids
        shift = position + begin
        offsets += [(shift + first, shift + last) for first, last in part_offsets]
    return ids, offsets, _mask(offsets, spans) or []


def _mask(offsets: Offsets, spans: Spans) -> list[bool] | None:
    """Whether each token begins in a span; None if one is across an edge. Both are in order."""
    learned = []
    number = 0
    for begin, end in offsets:
        while number < len(spans) and begin >= spans[number][1]:
            number += 1
        inside = number < len(spans) and begin >= spans[number][0]
        if number < len(spans) and end > spans[number][1 if inside else 0]:
            return None
        learned.append(inside)
    return learned
