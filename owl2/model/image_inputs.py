"""Whether token ids and images fit each other and the model.

Looking at numbers makes the host wait for a GPU until all work queued before is done. So a forward
looks once, at all that it wants to know together, before it has queued anything (`TokenCounts.of`);
and not at all where there can be no image, in a step of one new token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from owl2.errors import InputError
from owl2.model.modality import VISUAL

AUTHORS_PLACEHOLDER = -200


class TokenCounts(NamedTuple):
    """What a batch of ids holds, as numbers of the host.

    Attributes:
        image_tokens: of each of B sequences, how many image tokens.
        visual: how many positions of all are of the visual modality.
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
        """Read them; a GPU is waited for once.

        Args:
            input_ids: (B, S).
            image_token_id: the largest id there is, just past the vocabulary.
            token_types: (B, S) modalities; those of the ids where absent.

        Raises:
            InputError: an id that is neither a word's nor an image's.
        """
        if not input_ids.numel():
            return cls([0] * len(input_ids), 0)
        image_tokens = (input_ids == image_token_id).sum(1)  # (B,)
        visual = image_tokens.sum() if token_types is None else (token_types == VISUAL).sum()
        bounds = torch.stack([*input_ids.aminmax(), visual.to(input_ids)])
        low, high, visual_count, *counts = torch.cat([bounds, image_tokens.to(bounds)]).tolist()
        if low < 0 or high > image_token_id:
            raise _no_such_id(low if low < 0 else high, image_token_id)
        return cls(counts, visual_count)


def _no_such_id(wrong: int, image_token_id: int) -> InputError:
    hint = (
        f"{AUTHORS_PLACEHOLDER} is the placeholder of the authors' code; here "
        if wrong == AUTHORS_PLACEHOLDER
        else ""
    )
    return InputError(
        f"input_ids hold {wrong}; ids go from 0 to {image_token_id}, the image token. {hint}"
        "an image takes several image tokens, which the processor writes"
    )


def images_per_sequence(
    image_tokens: Sequence[int], images: torch.Tensor | None, per_image: int
) -> list[int]:
    """How many images each sequence has room for, which must be those that there are.

    Args:
        image_tokens: of each of B sequences, how many image tokens.
        images: one an image along the first dimension, N of them; or None.
        per_image: image tokens an image, K + 1.

    Returns:
        B numbers, whose sum is N.

    Raises:
        InputError: with both counts; or if a sequence holds a part of an image.
    """
    positions, given = sum(image_tokens), 0 if images is None else len(images)
    if positions != given * per_image:
        raise InputError(
            f"input_ids hold {positions} image tokens, room for {positions / per_image:g} "
            f"images of {per_image} tokens each, but pixel_values hold {given} images"
        )
    for row, count in enumerate(image_tokens):
        if count % per_image:
            raise InputError(
                f"row {row} of input_ids holds {count} image tokens, but an image takes "
                f"{per_image}: a prompt must hold whole images"
            )
    return [count // per_image for count in image_tokens]
