"""Batches of prompts: images in order of appearance, and rows of one length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import IMAGE_TOKEN


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
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    elif not isinstance(images, (list, tuple)):
        images = [images]
    if not any(isinstance(item, (list, tuple)) or item is None for item in images):
        _check_count("prompt" if len(counts) == 1 else "batch", sum(counts), len(images))
        return list(images)
    if len(images) != len(counts):
        raise InputError(
            f"{len(counts)} prompts, but images for {len(images)} prompts were passed.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    flat: list[Any] = []
    for index, (count, row) in enumerate(zip(counts, images, strict=True)):
        row = list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
        name = f"prompt {index + 1} of {len(counts)}" if len(counts) > 1 else "prompt"
        _check_count(name, count, len(row))
        flat += row
    return flat


def _check_count(name: str, placeholders: int, images: int) -> None:
    if placeholders != images:
        raise InputError(
            f"The {name} has {placeholders} {IMAGE_TOKEN} placeholder(s), but {images} image(s) "
            "were passed: each placeholder takes one image.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )


def pad(
    rows: Sequence[list[int]],
    pad_id: int,
    side: str,
    padding: bool | str = False,
    max_length: int | None = None,
    multiple: int | None = None,
    as_tensor: bool = True,
) -> dict[str, list[list[int]]]:
    """B rows of ids to `input_ids` and `attention_mask` (1 for tokens, 0 for padding).

    Args:
        side: "left" or "right".
        padding: True or "longest", "max_length" (to `max_length` tokens), or False.
        multiple: Pad to a multiple of this number of tokens.
        as_tensor: The rows will be converted to one tensor, so they must have equal lengths.

    Raises:
        InputError: An argument is invalid, a row is longer than `max_length`, or the lengths differ
            without padding.
    """
    if side not in ("left", "right"):
        raise InputError(
            f"padding_side is {side!r}; choose from left, right.", ErrorCode.INVALID_VALUE
        )
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise InputError(
            f"padding is {padding!r}; choose from True, False, longest, max_length.",
            ErrorCode.INVALID_VALUE,
        )
    lengths = [len(row) for row in rows]
    width = 0
    if padding == "max_length":
        if max_length is None:
            raise InputError("padding='max_length' requires max_length.", ErrorCode.MISSING_VALUE)
        if max(lengths) > max_length:
            raise InputError(
                f"A prompt has {max(lengths)} tokens, more than max_length {max_length}.",
                ErrorCode.TOO_LONG,
            )
        width = max_length
    elif padding in (True, "longest"):
        width = max(lengths)
    elif as_tensor and len(set(lengths)) > 1:
        raise InputError(
            f"Prompts of {min(lengths)} to {max(lengths)} tokens do not fit into one tensor: pass "
            "padding=True.",
            ErrorCode.INVALID_VALUE,
        )
    if multiple:
        width = -(-width // multiple) * multiple
    data: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for row in rows:
        empty = max(0, width - len(row))
        before, after = (empty, 0) if side == "left" else (0, empty)
        data["input_ids"].append([pad_id] * before + row + [pad_id] * after)
        data["attention_mask"].append([0] * before + [1] * len(row) + [0] * after)
    return data
