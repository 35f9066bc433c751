"""Checks that token ids fit the images and the model.

Reading values of a tensor synchronizes with a GPU. A forward pass therefore reads all values that
it needs at one time, before it queues work (`TokenCounts.of`), and reads nothing in a step of one
new token, which cannot contain an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from owl2.errors import ErrorCode, InputError
from owl2.model.modality import VISUAL

AUTHORS_PLACEHOLDER = -200


class TokenCounts(NamedTuple):
    """Counts of a batch of ids, on the host.

    Attributes:
        image_tokens: The number of image tokens in each of B sequences.
        visual: The number of positions of the visual modality in the batch.
    """

    image_tokens: list[int]
    visual: int

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        image_token_id: int,
        token_types: torch.Tensor | None = None,
    ) -> "TokenCounts":
        """Count; synchronizes once with a GPU.

        Args:
            input_ids: (B, S).
            image_token_id: The largest valid id, the first after the vocabulary.
            token_types: (B, S) modalities. Default: derived from the ids.

        Raises:
            InputError: An id is neither in the vocabulary nor the image token.
        """
        if not input_ids.numel():
            return cls([0] * len(input_ids), 0)
        image_tokens = (input_ids == image_token_id).sum(1)  # (B,)
        visual = image_tokens.sum() if token_types is None else (token_types == VISUAL).sum()
        bounds = torch.stack([*input_ids.aminmax(), visual.to(input_ids)])
        low, high, num_visual, *counts = torch.cat([bounds, image_tokens.to(bounds)]).tolist()
        if low < 0 or high > image_token_id:
            wrong = low if low < 0 else high
            is_placeholder = wrong == AUTHORS_PLACEHOLDER
            hint = "The authors' code uses -200 as a placeholder. " if is_placeholder else ""
            raise InputError(
                f"input_ids contain {wrong}; valid ids are 0 to {image_token_id}, the image token. "
                f"{hint}The processor writes several image tokens for each image.",
                ErrorCode.INVALID_VALUE,
            )
        return cls(counts, num_visual)


def images_per_sequence(
    image_tokens: Sequence[int], images: torch.Tensor | None, per_image: int
) -> list[int]:
    """The number of images in each sequence.

    Args:
        image_tokens: The number of image tokens in each of B sequences.
        images: N images along the first dimension, or None.
        per_image: Image tokens per image, K + 1.

    Returns:
        B counts with the sum N.

    Raises:
        InputError: The total does not match the number of images (the message has both counts), or
            a sequence contains an incomplete image.
    """
    positions, given = sum(image_tokens), 0 if images is None else len(images)
    if positions != given * per_image:
        raise InputError(
            f"input_ids contain {positions} image tokens, enough for {positions / per_image:g} "
            f"images of {per_image} tokens each, but pixel_values contain {given} images",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    for row, count in enumerate(image_tokens):
        if count % per_image:
            raise InputError(
                f"row {row} of input_ids contains {count} image tokens, but an image takes "
                f"{per_image}: an image must not be split across prompts",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
    return [count // per_image for count in image_tokens]
