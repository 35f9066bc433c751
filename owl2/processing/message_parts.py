"""The parts of messages, and their order: texts, and placeholders of images and videos."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_TOKEN = "<|image|>"
VIDEO_TOKEN = "<|video|>"
TOKENS = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}  # by the type of a part
MEDIA = re.compile(r"<\|(image|video)\|>")
_LEADING_MEDIA = re.compile(rf"\s*(?:{MEDIA.pattern}\s*)+")


def move_images_first(parts: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The parts of a user message with its images and videos before its texts, each in order.

    Models of the family are trained with images before the text. `<|image|>` or `<|video|>` in a
    text is a place that the author of the text chose; such a message is not changed. Texts that an
    image separated become lines, and white space before a last image is removed.
    """
    images = [part for part in parts if part["type"] != "text"]
    if all(part["type"] != "text" for part in parts[: len(images)]):
        return list(parts)
    texts: list[str] = []
    is_separated = False
    for part in parts:
        if part["type"] != "text":
            is_separated = True
            continue
        text = part["text"]
        if MEDIA.search(text):
            return list(parts)
        if is_separated and texts and not (texts[-1][-1:].isspace() or text[:1].isspace()):
            text = f"\n{text}"
        texts.append(text)
        is_separated = False
    if is_separated:
        texts[-1] = texts[-1].rstrip()
    return [*images, *({"type": "text", "text": text} for text in texts if text)]


def insert_image_newlines(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Separate the images that start a user turn from its text by exactly one line break.

    Specification §1.5. White space around and between these images is removed, so that a turn has
    the same ids whether its images are placeholders on lines or parts of a message. A turn with an
    image inside or after its text is not changed.
    """
    separated = []
    for turn in turns:
        images, text = split_leading_images(turn)
        if images and not MEDIA.search(text):
            placeholders = "".join(match[0] for match in MEDIA.finditer(images))
            turn = {**turn, "content": text_to_parts(placeholders + (f"\n{text}" if text else ""))}
        separated.append(turn)
    return separated


def split_leading_images(turn: Mapping[str, Any]) -> tuple[str, str]:
    """The images that start a turn with the white space around them, and the other text."""
    text = content_to_text(turn["content"])
    found = _LEADING_MEDIA.match(text)
    return (found[0], text[found.end() :]) if found else ("", text)


def text_to_parts(text: str) -> list[dict[str, Any]]:
    """A text with placeholders as the parts of a message; `content_to_text` is the inverse."""
    parts: list[dict[str, Any]] = []
    for index, segment in enumerate(MEDIA.split(text)):
        if index % 2:
            parts.append({"type": segment})
        elif segment:
            parts.append({"type": "text", "text": segment})
    return parts


def content_to_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """The concatenated parts of a message, with `<|image|>` for images, `<|video|>` for videos."""
    return "".join(TOKENS.get(part["type"]) or part["text"] for part in parts)


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` has a surrogate without its pair, as in JSON that was cut inside an emoji.

    Python allows such strings; tokenizers and UTF-8 files do not.
    """
    return re.search("[\ud800-\udfff]", text) is not None
