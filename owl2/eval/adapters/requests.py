"""What lmms-eval's tasks ask, in our terms: words and images → messages, settings → options."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from owl2.data.sample import Message
from owl2.errors import InputError
from owl2.eval.video import frames_of
from owl2.processing.chat_template import IMAGE_TOKEN

ImageInput = Image.Image | os.PathLike[str]

VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".gif")

# How tasks mark an image's place in their words; the number, where there is one, is its own.
_MARK = re.compile(r"<image(?: ?(\d+))?>")


def turn(words: str, images: Sequence[ImageInput]) -> list[Message]:
    """A user's turn: images where the words mark them, else before the words (SPEC 1.5).

    Marks are ``<image>`` in order, or ``<image 1>``. Where there are not as many as images they
    are left out, and all images come first.
    """
    words = words.replace(IMAGE_TOKEN, "")
    marks = list(_MARK.finditer(words))
    numbers = [int(mark[1]) - 1 if mark[1] else place for place, mark in enumerate(marks)]
    parts: list[dict[str, Any]] = []
    if images and sorted(numbers) == list(range(len(images))):
        end = 0
        for mark, number in zip(marks, numbers, strict=True):
            parts += [_text(words[end : mark.start()]), _image(images[number])]
            end = mark.end()
        parts.append(_text(words[end:]))
    else:
        parts = [*map(_image, images), _text(_MARK.sub("", words) if images else words)]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _image(image: ImageInput) -> dict[str, Any]:
    return {"type": "image", "image": image}


def images_of(found: Iterable[Any], max_frames: int) -> list[ImageInput]:
    """What a task's `doc_to_visual` gives: images, and paths of images or videos.

    Raises:
        InputError: something else, such as sound; a video that cannot be read.
    """
    images: list[ImageInput] = []
    for item in found if isinstance(found, (list, tuple)) else [found]:
        if isinstance(item, Image.Image):
            images.append(item)
        elif isinstance(item, (str, Path)):
            path = Path(item)
            is_video = path.is_dir() or path.suffix.lower() in VIDEOS
            images += frames_of(path, max_frames) if is_video else [path]
        else:
            raise InputError(f"{type(item).__name__} is neither an image nor a path of one.")
    return images


def decoding(settings: Mapping[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], list[str]]:
    """lmms-eval's `generation_kwargs` → the engine's options, and the texts that end an answer.

    A task that gives a temperature and ``do_sample: false`` means the latter; a temperature of 0 is
    greedy, too.

    Raises:
        InputError: beams, which this engine has not.
    """
    if (beams := settings.get("num_beams")) not in (None, 1):
        raise InputError(f"generation_kwargs: num_beams is {beams}; the model owl2 has no beams.")
    given = settings.get("max_new_tokens", settings.get("max_gen_toks"))
    options: dict[str, Any] = {"max_new_tokens": given or max_new_tokens, "do_sample": False}
    if settings.get("do_sample") and settings.get("temperature") != 0:
        drawn = {name: settings.get(name) for name in ("temperature", "top_p", "top_k")}
        options |= {"do_sample": True, **{name: value for name, value in drawn.items() if value}}
    until = settings.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first of these; an empty one ends nothing."""
    for end in filter(None, until):
        text = text.split(end, 1)[0]
    return text
