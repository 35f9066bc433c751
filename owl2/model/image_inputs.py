"""Embeddings of token ids, and checks that they fit the images and the model.

Reading values of a tensor synchronizes with a GPU. A forward pass therefore reads all values that
it needs at one time, before it queues work (`count_images`), and reads nothing in a step of one
new token, which cannot contain an image.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.model.modality import VISUAL

AUTHORS_PLACEHOLDER = -200


class TokenEmbedding(nn.Embedding):
    """`nn.Embedding` that gives NaN for the image token, which may have no row.

    `Owl2Model.forward` replaces these embeddings by those of the images. Prompt tuning embeds the
    ids itself and passes `inputs_embeds` with `pixel_values`. NaN also marks the positions of
    images after a hook has changed the embeddings (NEFTune adds noise).
    """

    def __init__(self, config: Owl2Config) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.image_token_id = config.image_token_id

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name of the base class
        # A step of one new token cannot contain an image.
        if input.shape[-1:] == (1,):
            return super().forward(input)
        is_image = input == self.image_token_id
        embeddings = super().forward(input.masked_fill(is_image, 0))
        return embeddings.masked_fill(is_image[..., None], float("nan"))


def find_image_embeddings(config: Owl2Config, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Ids (B, S) with the image token where `inputs_embeds` (B, S, D) has its embedding."""
    is_image = inputs_embeds.isnan().all(-1)
    return torch.where(is_image, config.image_token_id, 0 if config.image_token_id else 1)


def check_embeddings(inputs_embeds: torch.Tensor, token_types: torch.Tensor | None) -> int:
    """Check that images are inserted in `inputs_embeds` (B, S, D); synchronizes once with a GPU.

    Returns:
        The number of visual positions in `token_types` (B, S).

    Raises:
        InputError: Positions contain the embedding of the image token.
    """
    missing = inputs_embeds.isnan().all(-1).sum()
    num_visual = missing.new_zeros(()) if token_types is None else (token_types == VISUAL).sum()
    num_missing, count = torch.stack([missing, num_visual.to(missing.device)]).tolist()
    if num_missing:
        raise InputError(
            f"inputs_embeds contain the embeddings of {num_missing} image tokens: pass the images "
            "as pixel_values, or insert their embeddings (Owl2Model.embed)",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    return int(count)


def count_images(
    config: Owl2Config,
    input_ids: torch.Tensor,
    images: torch.Tensor | None,
    token_types: torch.Tensor | None = None,
    per_image: int | None = None,
) -> tuple[list[int], int]:
    """Count the images of a batch; synchronizes once with a GPU.

    Args:
        input_ids: (B, S).
        images: N images along the first dimension, or None.
        token_types: (B, S) modalities. Default: derived from the ids.
        per_image: Image tokens of each of the N. Default: those of an image, K + 1.

    Returns:
        The number of images in each of B sequences, and the number of positions of the visual
        modality in the batch.

    Raises:
        InputError: An id is neither in the vocabulary nor the image token; the numbers of image
            tokens and images do not fit (the message has both); or an image is incomplete.
    """
    per_image = per_image or config.num_image_tokens
    counts, num_visual = [0] * len(input_ids), 0
    if input_ids.numel():
        is_image = input_ids == config.image_token_id
        image_tokens = is_image.sum(1)  # (B,)
        visual = image_tokens.sum() if token_types is None else (token_types == VISUAL).sum()
        bounds = [*input_ids.masked_fill(is_image, 0).aminmax(), visual.to(input_ids)]
        low, high, num_visual, *counts = torch.cat(
            [torch.stack(bounds), image_tokens.to(input_ids)]
        ).tolist()
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            is_placeholder = wrong == AUTHORS_PLACEHOLDER
            hint = "The authors' code uses -200 as a placeholder. " if is_placeholder else ""
            raise InputError(
                f"input_ids contain {wrong}; valid ids are 0 to {config.vocab_size - 1}, and "
                f"{config.image_token_id} for images. {hint}The processor writes several image "
                "tokens for each image.",
                ErrorCode.INVALID_VALUE,
            )
    positions, num_images = sum(counts), 0 if images is None else len(images)
    if positions != num_images * per_image:
        raise InputError(
            f"input_ids contain {positions} image tokens, enough for {positions / per_image:g} "
            f"images of {per_image} tokens each, but pixel_values contain {num_images} images",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    for row, count in enumerate(counts):
        if count % per_image:
            raise InputError(
                f"row {row} of input_ids contains {count} image tokens, but an image takes "
                f"{per_image}: an image must not be split across prompts",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
    return [count // per_image for count in counts], num_visual


def repeat_images(
    counts: list[int], times: int, pixel_values: torch.Tensor, image_grids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Repeat the images of each prompt, for beams and several answers.

    Args:
        counts: Images of each prompt.
        pixel_values, image_grids: See `Owl2ForConditionalGeneration.forward`.
    """
    if image_grids is not None:
        crops = [int(1 + grid.prod()) for grid in image_grids]
        bounds = [sum(counts[:row]) for row in range(len(counts) + 1)]
        image_grids = _repeat_parts(image_grids, counts, times)
        counts = [sum(crops[start:end]) for start, end in pairwise(bounds)]
    return _repeat_parts(pixel_values, counts, times), image_grids


def _repeat_parts(rows: torch.Tensor, counts: list[int], times: int) -> torch.Tensor:
    return torch.cat([part for part in rows.split(counts) for _ in range(times)])


def default_ntk_alphas(
    config: Owl2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> torch.Tensor | None:
    """`config.ntk_alpha` for each of B prompts; None if it is 1 for all.

    Raises:
        InputError: The cache is filled, so that the lengths of the prompts are unknown, and they
            matter.
    """
    length = inputs_embeds.shape[1]
    cached = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    if config.ntk_alpha(cached + length) == 1:
        return None
    if cached:
        raise InputError(
            f"The sequence has {cached + length} positions. With a filled cache, pass ntk_alphas, "
            "the config.ntk_alpha of the length of each prompt",
            ErrorCode.MISSING_VALUE,
        )
    return prompt_ntk_alphas(config, inputs_embeds, attention_mask)


def prompt_ntk_alphas(
    config: Owl2Config, prompts: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """(B,) `config.ntk_alpha` of prompts (B, S, ...), without their padding in a mask (B, S)."""
    lengths = [prompts.shape[1]] * len(prompts)
    if attention_mask is not None and attention_mask.dim() == 2:
        lengths = attention_mask.sum(1).tolist()
    alphas = [config.ntk_alpha(length) for length in lengths]
    return torch.tensor(alphas, device=prompts.device, dtype=torch.float32)


def ntk_options(config: Owl2Config, alphas: Any, device: torch.device) -> dict[str, Any]:
    """The argument `ntk_alphas` of `forward`, for models that have it."""
    if not config.has_dynamic_ntk:
        return {}
    return {"ntk_alphas": torch.tensor(list(alphas), device=device, dtype=torch.float32)}
