"""Whether token ids and pictures fit each other and the model."""

import torch

from owl2.errors import InputError

AUTHORS_PLACEHOLDER = -200


def check_ids(input_ids: torch.Tensor, image_token_id: int) -> None:
    """Raise an InputError if `input_ids` (B, S) hold an id that is neither a word's nor an image's.

    Args:
        image_token_id: the largest id there is, just past the vocabulary.
    """
    if not input_ids.numel():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low >= 0 and high <= image_token_id:
        return
    wrong = low if low < 0 else high
    hint = (
        f"{AUTHORS_PLACEHOLDER} is the placeholder of the authors' code; here "
        if wrong == AUTHORS_PLACEHOLDER
        else ""
    )
    raise InputError(
        f"input_ids hold {wrong}; ids go from 0 to {image_token_id}, the image token. {hint}"
        "a picture takes several image tokens, which the processor writes"
    )


def check_pictures(
    is_image: torch.Tensor, pictures: torch.Tensor | None, per_image: int
) -> list[int]:
    """How many pictures each sequence has room for, which must be those that there are.

    Args:
        is_image: (B, S), True on image tokens.
        pictures: one a picture along the first dimension, or None.
        per_image: image tokens a picture, K + 1.

    Returns:
        B numbers, whose sum is N.

    Raises:
        InputError: with both counts; or if a sequence holds a part of a picture.
    """
    tokens: list[int] = is_image.sum(1).tolist()
    positions, given = sum(tokens), 0 if pictures is None else len(pictures)
    if positions != given * per_image:
        raise InputError(
            f"input_ids hold {positions} image tokens, room for {positions / per_image:g} "
            f"pictures of {per_image} tokens each, but pixel_values hold {given} pictures"
        )
    for row, count in enumerate(tokens):
        if count % per_image:
            raise InputError(
                f"row {row} of input_ids holds {count} image tokens, but a picture takes "
                f"{per_image}: a prompt must hold whole pictures"
            )
    return [count // per_image for count in tokens]
