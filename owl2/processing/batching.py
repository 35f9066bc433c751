"""Several prompts → one batch: whose images are whose, and rows of one length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import IMAGE_TOKEN


def flatten_images(counts: Sequence[int], images: Any) -> list[Any]:
    """Images as a user gives them → one flat list in order of appearance.

    `counts`: the placeholders of each prompt. `images`: one image, a list for all prompts, or a
    list for each prompt. Raises `InputError` with both counts where they differ.
    """
    if images is None:
        images = []
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    elif not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(item, (list, tuple)) or item is None for item in images):
        if len(images) != len(counts):
            raise InputError(f"{len(counts)} prompts, but images for {len(images)} were given.")
        rows = [
            list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
            for row in images
        ]
        for number, (count, row) in enumerate(zip(counts, rows, strict=True)):
            if count != len(row):
                which = f"Prompt {number + 1} of {len(counts)}" if len(counts) > 1 else "The prompt"
                raise _miscount(which, count, len(row))
        return [image for row in rows for image in row]
    if sum(counts) != len(images):
        raise _miscount("The prompt" if len(counts) == 1 else "The batch", sum(counts), len(images))
    return list(images)


def _miscount(which: str, placeholders: int, images: int) -> InputError:
    holds = f"{placeholders} {IMAGE_TOKEN} placeholder{'' if placeholders == 1 else 's'}"
    given = f"{images} image{' was' if images == 1 else 's were'} given"
    return InputError(
        f"{which} has {holds}, but {given}: each placeholder takes one image.",
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
    """B rows of ids → `input_ids` and `attention_mask` (1: a token, 0: padding), equally long if
    asked.

    `padding`: True or "longest", "max_length" (`max_length` tokens), False. `as_tensor`: the rows
    are to become one tensor. Raises `InputError` if they cannot, or if a row is longer than
    `max_length`.
    """
    if side not in ("left", "right"):
        raise InputError(f"padding_side is {side!r}; it must be 'left' or 'right'.")
    width = _width([len(row) for row in rows], padding, max_length, multiple, as_tensor)
    data: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for row in rows:
        empty = max(0, width - len(row))
        before, after = (empty, 0) if side == "left" else (0, empty)
        data["input_ids"].append([pad_id] * before + row + [pad_id] * after)
        data["attention_mask"].append([0] * before + [1] * len(row) + [0] * after)
    return data


def _width(
    lengths: Sequence[int],
    padding: bool | str,
    max_length: int | None,
    multiple: int | None,
    as_tensor: bool,
) -> int:
    """How many tokens every row is filled up to (0: not at all)."""
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise InputError(
            f"padding is {padding!r}; it must be True, False, 'longest' or 'max_length'."
        )
    if padding == "max_length":
        if max_length is None:
            raise InputError("padding='max_length' needs max_length.")
        if max(lengths) > max_length:
            raise InputError(
                f"A prompt has {max(lengths)} tokens, {max(lengths) - max_length} more than "
                f"max_length {max_length}."
            )
        width = max_length
    elif padding in (True, "longest"):
        width = max(lengths)
    elif as_tensor and len(set(lengths)) > 1:
        raise InputError(
            f"Prompts of {min(lengths)} to {max(lengths)} tokens do not fit into one tensor: "
            "pass padding=True."
        )
    else:
        return 0
    return -(-width // multiple) * multiple if multiple else width
