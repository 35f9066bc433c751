"""Requests of lmms-eval → messages and sampling parameters of the engine."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from owl2.data.sample import Message
from owl2.errors import ErrorCode, InputError
from owl2.eval.video import frame_files
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.messages import user_message
from owl2.processing.video import VIDEO_SUFFIXES

ImageInput = Image.Image | os.PathLike[str]

VIDEOS = (*VIDEO_SUFFIXES, ".gif")

# The placeholder of an image in the text of a task, with an optional number.
_PLACEHOLDER = re.compile(r"<image(?: ?(\d+))?>")


def to_messages(text: str, images: Sequence[ImageInput]) -> list[Message]:
    """A user message with images at their placeholders, or else before the text.

    Placeholders are ``<image>`` in order, or ``<image 1>``. If their number is not that of the
    images, they are removed and all images come first (Specification §1.5).
    """
    text = text.replace(IMAGE_TOKEN, "")
    found = list(_PLACEHOLDER.finditer(text))
    indices = [int(mark[1]) - 1 if mark[1] else index for index, mark in enumerate(found)]
    if images and sorted(indices) == list(range(len(images))):
        images = [images[index] for index in indices]
        text = _PLACEHOLDER.sub(IMAGE_TOKEN, text)
    elif images:
        text = _PLACEHOLDER.sub("", text)
    return [user_message(text, images)]


def load_visuals(visuals: Iterable[Any], max_frames: int) -> list[ImageInput]:
    """The result of `doc_to_visual` of a task (images, paths of images or videos) → images.

    Raises:
        InputError: Another type, such as audio; a video that cannot be read.
    """
    images: list[ImageInput] = []
    for item in visuals if isinstance(visuals, (list, tuple)) else [visuals]:
        if isinstance(item, Image.Image):
            images.append(item)
        elif isinstance(item, (str, Path)):
            path = Path(item)
            is_video = path.is_dir() or path.suffix.lower() in VIDEOS
            images += frame_files(path, max_frames) if is_video else [path]
        else:
            raise InputError(
                f"{type(item).__name__} is not an image or a path.", ErrorCode.INVALID_TYPE
            )
    return images


def sampling_kwargs(
    settings: Mapping[str, Any], max_new_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """`generation_kwargs` of lmms-eval → keyword arguments of `Engine.batch`, and stop strings.

    A task with a temperature and ``do_sample: false`` is greedy; so is a temperature of 0.

    Raises:
        InputError: The task requests beam search.
    """
    if (beams := settings.get("num_beams")) not in (None, 1):
        raise InputError(
            f"generation_kwargs: num_beams is {beams}; the model owl2 has no beam search.",
            ErrorCode.UNSUPPORTED,
        )
    given = settings.get("max_new_tokens", settings.get("max_gen_toks"))
    options: dict[str, Any] = {"max_new_tokens": given or max_new_tokens, "do_sample": False}
    if settings.get("do_sample") and settings.get("temperature") != 0:
        sampling = {name: settings.get(name) for name in ("temperature", "top_p", "top_k")}
        options |= {"do_sample": True, **{name: value for name, value in sampling.items() if value}}
    until = settings.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


def truncate(text: str, until: Iterable[str]) -> str:
    """The text before the first stop string; empty ones are ignored."""
    for stop in filter(None, until):
        text = text.split(stop, 1)[0]
    return text
