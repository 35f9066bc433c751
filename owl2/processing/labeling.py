"""Conversations with their answers marked, for `Owl2Processor.for_training` and related methods.

::

    messages ──chat template──► text, answer spans ──encode_with_loss_mask──► ids, loss mask
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import Spans
from owl2.processing.loss_mask import EncodedConversation, encode_with_loss_mask, render_mask
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.messages import ParsedMessages, parse_messages
from owl2.processing.prepared_prompt import expand_media
from owl2.processing.video import requested_num_frames

if TYPE_CHECKING:
    from owl2.processing.processor import Owl2Processor


def encode_labeled(
    processor: "Owl2Processor", conversation: ParsedMessages, requires_images: bool = False
) -> tuple[EncodedConversation, list[Any]]:
    """The ids of a conversation that ends with an answer, with the loss mask of training.

    Images are opened only if the number of their tokens depends on their sizes.

    Args:
        requires_images: Raise an `InputError` if there are fewer images than placeholders.

    Returns:
        The encoded conversation and its images, with the frames of videos.

    Raises:
        InputError: There is no answer, the tokenizer has no end token or no offsets, or the
            template does not mark the answers.
    """
    tokenizer = processor.tokenizer
    if conversation.is_open:
        raise InputError("The last turn has no answer to train on: add it.", ErrorCode.INVALID_ROLE)
    if tokenizer.eos_token is None:
        raise InputError(
            "The tokenizer has no end token to learn: set eos_token.", ErrorCode.MISSING_VALUE
        )
    turns = conversation.without_end_tokens(tokenizer.eos_token)
    rendered = processor.render_conversation(turns, return_assistant_tokens_mask=True)
    images = list(conversation.images)
    if requires_images or rendered[0].count(IMAGE_TOKEN) == len(images):
        media = [images], [conversation.videos]
        (rendered,), images = expand_media(
            processor.image_processor, [rendered], *media, processor.num_frames
        )
    ids = processor.start_ids, [processor.image_token_id] * processor.num_image_tokens
    sample = encode_with_loss_mask(tokenizer, *rendered, *ids, conversation.has_loss)
    return sample, images


def show_labels(processor: "Owl2Processor", messages: Any) -> Text:
    """The model's input in training for a terminal: labels in color, other tokens dim.

    It is rendered from the ids and the mask of `Owl2Processor.for_training`. The tokens of an image
    are written as `<|image|>×(K+1)`, and images are opened as for `encode_labeled`.
    """
    sample, _ = encode_labeled(processor, parse_messages(messages))
    start = "".join(processor.tokenizer.convert_ids_to_tokens(processor.start_ids))
    return render_mask(sample, start, processor.num_image_tokens)


def assistant_masks(
    processor: "Owl2Processor",
    texts: Sequence[tuple[str, Spans]],
    attention_mask: Iterable[Iterable[Any]],
    options: Mapping[str, Any],
) -> list[list[int]]:
    """The mask (B,S) of the tokens of answers, for `Owl2Processor.apply_chat_template`.

    Args:
        texts: The rendered conversations with their answer spans.
        attention_mask: (B,S), of the model's inputs, whose padding and truncation it shows.
        options: Of `Owl2Processor.__call__`, with `images` and `videos`.
    """
    tokenizer = processor.tokenizer
    num_frames = requested_num_frames(
        {**options, **options.get("videos_kwargs", {})}, processor.num_frames
    )
    media = options["images"], options["videos"]
    texts, _ = expand_media(processor.image_processor, texts, *media, num_frames)
    start = [] if options.get("add_special_tokens") is False else processor.start_ids
    ids = start, [processor.image_token_id] * processor.num_image_tokens
    return [
        encode_with_loss_mask(tokenizer, *text, *ids).mask_of(row, tokenizer.truncation_side)
        for text, row in zip(texts, attention_mask, strict=True)
    ]
