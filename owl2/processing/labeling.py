"""Conversations to labeled samples for training: a part of `Owl2Processor`."""

from typing import Any

from rich.text import Text
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import Spans
from owl2.processing.loss_mask import EncodedConversation, encode_with_loss_mask, render_mask
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.messages import ParsedMessages, parse_messages
from owl2.processing.prepared_prompt import expand_media


class LabelingMixin(ProcessorMixin):
    """The methods of `Owl2Processor` for training."""

    tokenizer: Any
    image_processor: Any
    image_token_id: int
    num_image_tokens: int
    _start_ids: list[int]
    _image_ids: list[int]
    num_frames: int
    _render: Any
    _template: Any

    def for_training(
        self, messages: Any, max_length: int | None = None, return_pixel_values: bool = True
    ) -> BatchFeature:
        """A conversation that ends with an answer as a batch of one.

        Args:
            max_length: Truncate longer samples on the right, which can remove all labels.
            return_pixel_values: False for a check that computes no pixels. Images are opened only
                if the number of their tokens depends on their sizes.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels`, all (1,S), and
            `pixel_values` (N,3,size,size), absent without images. `labels` are the ids in the
            template's generation blocks (the answers and their end tokens), -100 elsewhere.

        Raises:
            InputError: See `parse_messages` and `Owl2Processor.__call__`; also if an image is
                beyond `max_length`.
        """
        sample, images = self._encode_labeled(parse_messages(messages), requires_images=True)
        data = sample.to_batch(self.image_token_id, max_length)
        if images and return_pixel_values:
            data.update(self.image_processor(images))
        return BatchFeature(data)

    def show_labels(self, messages: Any) -> Text:
        """The model's input in training for a terminal: labels in color, other tokens dim.

        It is rendered from the ids and the mask of `for_training`. The tokens of an image are
        written as `<|image|>×(K+1)`, and images are opened as for `encode_labeled`.
        """
        sample = self.encode_labeled(parse_messages(messages))
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._start_ids))
        return render_mask(sample, start, self.num_image_tokens)

    def encode_labeled(self, conversation: ParsedMessages) -> EncodedConversation:
        """The ids of a conversation that ends with an answer, with the loss mask of training.

        Images are opened only if the number of their tokens depends on their sizes.

        Raises:
            InputError: There is no answer, the tokenizer has no end token or no offsets, or the
                template does not mark the answers.
        """
        return self._encode_labeled(conversation)[0]

    def _encode_labeled(
        self, conversation: ParsedMessages, requires_images: bool = False
    ) -> tuple[EncodedConversation, list[Any]]:
        """`encode_labeled`, and the images.

        Args:
            requires_images: Raise an `InputError` if there are fewer images than placeholders.
        """
        if conversation.is_open:
            raise InputError(
                "The last turn has no answer to train on: add it.", ErrorCode.INVALID_ROLE
            )
        if self.tokenizer.eos_token is None:
            raise InputError(
                "The tokenizer has no end token to learn: set eos_token.", ErrorCode.MISSING_VALUE
            )
        turns = conversation.without_end_tokens(self.tokenizer.eos_token)
        prompt: tuple[str, Spans] = self._render(
            turns, self._template(), return_assistant_tokens_mask=True
        )
        images = list(conversation.images)
        if requires_images or prompt[0].count(IMAGE_TOKEN) == len(images):
            media = [images], [conversation.videos]
            (prompt,), images = expand_media(
                self.image_processor, [prompt], *media, self.num_frames
            )
        ids = (self._start_ids, self._image_ids)
        tokenizer, has_loss = self.tokenizer, conversation.has_loss
        text, spans = prompt
        return encode_with_loss_mask(tokenizer, text, spans, *ids, has_loss), images
