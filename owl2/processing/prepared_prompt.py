"""A prompt that is ready for the model: token ids, pixels, and where the images are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.processing.messages import IMAGE_TOKEN


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt with its N images, each of which takes K + 1 tokens.

    `Owl2Processor.encode` makes one from messages, `from_ids` from token ids.

    Attributes:
        ids: S token ids, K + 1 times `image_token_id` for each image.
        pixel_values: (N, 3, H, W) on the CPU, or None without images.
        image_spans: Start and end position of each image's tokens.
        image_digests: A hash of each image's pixels; equal images have equal digests.
        is_continued: The answer continues the text of the prompt and keeps its white space.
    """

    ids: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_spans: tuple[tuple[int, int], ...]
    image_digests: tuple[bytes, ...]
    is_continued: bool = False

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[int],
        pixel_values: torch.Tensor | None,
        image_token_id: int,
        num_image_tokens: int,
    ) -> "PreparedPrompt":
        """Locate the images in token ids.

        Args:
            num_image_tokens: Tokens of an image, K + 1.

        Raises:
            InputError: No ids, or other numbers of image tokens than the images need.
        """
        if not ids:
            raise InputError("A prompt needs at least one token.", ErrorCode.EMPTY_MESSAGE)
        images = [] if pixel_values is None else list(pixel_values.cpu())
        positions = [position for position, id_ in enumerate(ids) if id_ == image_token_id]
        if len(positions) != len(images) * num_image_tokens:
            raise InputError(
                f"The prompt contains {len(positions)} image tokens, but {len(images)} image(s) of "
                f"{num_image_tokens} tokens each were given.",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        ends = [start + num_image_tokens for start in positions[::num_image_tokens]]
        spans = zip(positions[::num_image_tokens], ends, strict=True)
        digests = tuple(map(pixel_digest, images))
        return cls(tuple(ids), pixel_values if images else None, tuple(spans), digests)

    @property
    def continued_id(self) -> int | None:
        """The last id, if the answer continues its text."""
        return self.ids[-1] if self.is_continued else None

    def check_ids(self, config: Owl2Config) -> None:
        """Raise an InputError if an id is neither the image token nor in the model's vocabulary."""
        ids = {id_ for id_ in self.ids if not 0 <= id_ < config.vocab_size}
        if invalid := sorted(ids - {config.image_token_id}):
            raise InputError(
                f"The prompt contains the id {invalid[0]}; the model has embeddings of the ids 0 "
                f"to {config.vocab_size - 1}. For added tokens, call resize_token_embeddings.",
                ErrorCode.INVALID_VALUE,
            )


def pixel_digest(pixels: torch.Tensor) -> bytes:
    """A hash of an image's pixels, a tensor on the CPU; about 1 ms per megabyte."""
    data = pixels.detach().contiguous().view(torch.uint8).flatten().numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()


def flatten_images(counts: Sequence[int], images: Any) -> list[Any]:
    """The images of all prompts as one list, in order of appearance.

    Args:
        counts: The number of placeholders in each prompt.
        images: One image, a list for all prompts, or a list for each prompt.

    Raises:
        InputError: The numbers of placeholders and images differ.
    """
    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
        images = list(images) if is_batch else [images]
    if not any(isinstance(row, (list, tuple)) or row is None for row in images):
        counts, images = [sum(counts)], [images]
    if len(images) != len(counts):
        raise InputError(
            f"{len(counts)} prompts, but images for {len(images)} prompts were passed: the number "
            f"of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    flat: list[Any] = []
    for index, (count, row) in enumerate(zip(counts, images, strict=True), 1):
        row = list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
        if count != len(row):
            where = f"Prompt {index} of {len(counts)} has" if len(counts) > 1 else "There are"
            raise InputError(
                f"{where} {count} {IMAGE_TOKEN} placeholder(s), but {len(row)} image(s) were "
                "passed: each placeholder takes one image.",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        flat += row
    return flat
