"""Finds images, videos and sounds in a row that the row parser does not read.

A sample whose image is under another key would be trained without it. So keys, file names and
markers of media that are not read are errors. Other unknown keys are allowed, and reported.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from owl2.errors import ErrorCode, InputError, shorten

# The words of a key: "imagePath", "image_path" and "image-path" have the same two.
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+")
_PLACE = "path|url|uri|src|file|filename|name|link|bytes|data|list|dir|folder|base|b"
_ENDING = rf"(?:e?s)?(?:{_PLACE})*s?"
_IMAGE = re.compile(
    rf"(?:\w*image|\w*img|picture|pic|photo|photograph|screenshot|thumbnail){_ENDING}"
    r"|.*(?:图片|图像|照片).*"
)
_VIDEO = re.compile(rf"(?:\w*video|vid|media){_ENDING}|.*视频.*")
_SOUND = re.compile(rf"\w*audio{_ENDING}|.*音频.*")
_IS_PLACE = re.compile(rf".*(?:{_PLACE})s?")
# "image_id" and "image_width" describe an image.
_PROPERTY = re.compile(
    r"(?:id|index|idx|key|hash|sha|md|width|height|size|shape|resolution|ratio|area|num|number|count"
    r"|total|n|has|is|with|type|format|mode|category|class|label|caption|description|text|title"
    r"|source|dataset|split|license|credit|quality|score|time|duration|fps|start|end|token|only)"
    r"(?:e?s)?"
)
_MEDIA_FILE = re.compile(
    r"data:(?:image|video|audio)/|\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mkv|webm|mov|wav|mp3"
    r"|flac|ogg)(?:\?\S*)?$",
    re.IGNORECASE,
)
# Markers of other formats that occur in no HTML; ChatML's <|im_start|> is none.
_MARKER = re.compile(
    r"<\|\w*(?:image|img|video|vid|audio|sound|speech|media|vision)[\w ]*\|>"
    r"|<(?:im|image|img|video|audio|speech)[-_ ]?"
    r"(?:\d+|placeholder|pad|here|(?:soft_)?tokens?|patch|start|end|context|features?)>"
    r"|<(?:start|end)_of_(?:image|video|audio)>|\[(?:IMG|IMAGE|VIDEO|AUDIO)\]",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(?:img|image|picture|photo|video|audio|sound|speech)\s*/?>", re.IGNORECASE)
_TAG_AT_BORDER = re.compile(
    r"(?<![^\n])\s*<(?:image|video|audio)\s*/?>|<(?:image|video|audio)\s*/?>\s*(?![^\n])",
    re.IGNORECASE,
)
_NO_SOUND = "the model has no input for sounds"


def unused_keys(
    row: Mapping[str, Any],
    known: Collection[str],
    has_images: bool,
    is_attached: bool = False,
    where: str = "the row",
) -> tuple[str, ...]:
    """The keys of `row` with a value that are not `known`.

    Args:
        row: A row, or a turn or a part of its messages.
        has_images: The row has images or videos that are read. Keys that describe them
            (`image_id`) or name them a second time (`image_url`) are then allowed.
        is_attached: These images are stored next to the row, so that their names are not read.
        where: The name of `row` in messages.

    Raises:
        InputError: A key or a file name in its value names media that are not read. The message
            has the nearest known key.
    """
    unused = tuple(key for key, value in row.items() if key not in known and value is not None)
    for key in unused:
        words = [word.lower() for word in _WORDS.findall(str(key))]
        is_image = any(_IMAGE.fullmatch(word) for word in words)
        is_video = any(_VIDEO.fullmatch(word) for word in words)
        is_sound = any(_SOUND.fullmatch(word) for word in words)
        is_property = any(_PROPERTY.fullmatch(word) for word in words)
        if not row[key]:
            continue  # "image": "" of a text conversation
        if has_images and not (is_video or is_sound):
            is_unread = is_image and not (
                is_attached or is_property or any(_IS_PLACE.fullmatch(word) for word in words)
            )
        elif has_images:
            is_unread = not is_property
        else:
            is_media = is_image or is_video or is_sound
            is_unread = is_media or (key not in ("id", "source") and _is_file(row[key]))
        if is_unread and is_sound:
            raise InputError(f"{where} has {key!r}: {_NO_SOUND}", ErrorCode.UNSUPPORTED)
        if is_unread:
            kind = "video" if is_video else "image"
            hint = f"Did you mean '{kind}{'s' if isinstance(row[key], list) else ''}'?"
            if where != "the row":
                hint = f"The {kind}s of a row are under '{kind}s', or parts of its messages."
            raise InputError(
                f"{where} has {key!r} ({shorten(row[key])}), which is not read. {hint}",
                ErrorCode.UNKNOWN_NAME,
            )
    return unused


def refuse_markers(texts: Iterable[str], has_images: bool) -> None:
    """Raises `InputError` if a user text has a marker of media that is not read.

    Args:
        has_images: The row has images or videos. Tags such as <img> are then markers as well. In
            a text conversation tags are HTML, except for <image>, <video> and <audio> at the
            border of a line. What is closed, such as <video>...</video> and [IMG]...[/IMG], is no
            marker.
    """
    for text in texts:
        tags = (_TAG if has_images else _TAG_AT_BORDER).finditer(text)
        for found in (*_MARKER.finditer(text), *tags):
            marker = found[0].strip()
            name = re.escape(marker.strip("<>[]/ "))
            if re.search(rf"[<\[]/{name}[>\]]", text, re.IGNORECASE):
                continue
            kind = "video" if re.search("vid", marker, re.IGNORECASE) else "image"
            is_sound = re.search("audio|sound|speech", marker, re.IGNORECASE)
            reason = _NO_SOUND if is_sound else f"the marker of a row's {kind} is <{kind}>"
            raise InputError(
                f"the text has {marker}, which is not read: {reason}", ErrorCode.UNSUPPORTED
            )


def _is_file(value: Any) -> bool:
    if isinstance(value, (Mapping, list)):
        return any(map(_is_file, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, str) and _MEDIA_FILE.match(value) is not None
