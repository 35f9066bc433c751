"""Rows to samples, independent of the file format.

The keys of a row determine its kind::

    messages [+ images]        transformers' messages; a bare {"type": "image"} part is the next of
                               `images`
    conversations [+ image]    LLaVA's [{"from": "human" | "gpt", "value": ...}, ...]; <image> in a
                               text is the next of `image`
    caption | text + image     an image and its caption: the user turn is the image alone

Images are opened when a sample is used.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from owl2.data.sample import Message, Sample, validated
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user

# LLaVA's files write the first, mPLUG-Owl2's files the second.
_PLACEHOLDER = re.compile(r"<image>|<\|image\|>")
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_CAPTION_KEYS = ("caption", "text")

# An image of a row to a message part. Raises `InputError` for other values.
ImageReader = Callable[[Any], Message]


def parse_row(
    row: Any, source: str, read_image: ImageReader, attached: Sequence[Any] = ()
) -> Sample:
    """A row of any kind as a validated sample.

    The text of LLaVA rows is converted as in the authors' training code (Specification §1.5): a
    turn with one image becomes the image, a line break and the stripped text, wherever the
    placeholder was. In a turn with several images the placeholders keep their positions, because
    the text between them refers to them. Turns without images and `messages` are not changed.

    Args:
        attached: Images stored next to the row; image names in the row are then ignored.

    Raises:
        InputError: Starts with `source`. The row is of no kind or of several, the number of images
            does not fit, or see `validated`.
    """
    try:
        if not isinstance(row, Mapping):
            raise InputError(
                f"a row must be an object, not {type(row).__name__}", ErrorCode.INVALID_FORMAT
            )
        images = [read_image(image) for image in attached or _images(row)]
        messages = _PARSERS[_kind(row)](row, images, read_image)
    except InputError as error:
        raise InputError(f"{source}: {error}", error.code) from error
    return validated(Sample(messages, source))


def image_reader(root: Path) -> ImageReader:
    """Reads image names as paths relative to `root`; URLs are not changed."""
    return partial(_read_image, root)


def _read_image(root: Path, name: Any) -> Message:
    if not isinstance(name, str) or not name:
        raise InputError(
            f"an image must be a path or a URL, not {name!r:.80}", ErrorCode.INVALID_TYPE
        )
    if name.startswith(("http://", "https://", "data:")):
        return {"type": "image", "url": name}
    return {"type": "image", "path": str(root / expand_user(name))}


def image_root(directory: Path, images: str | Path | None) -> Path:
    """The root of image paths: `images`, else `directory`.

    Raises:
        InputError: It is not a directory.
    """
    root = directory if images is None else expand_user(images)
    if not root.is_dir():
        raise InputError(f"the image directory {root} does not exist", ErrorCode.FILE_NOT_FOUND)
    return root


def _kind(row: Mapping[str, Any]) -> str:
    kinds = [key for key in ("messages", "conversations") if row.get(key) is not None]
    if len(kinds) == 2:
        raise InputError("a row has both 'messages' and 'conversations'", ErrorCode.CONFLICT)
    if kinds:
        return kinds[0]
    if any(isinstance(row.get(key), str) for key in _CAPTION_KEYS):
        return "caption"
    raise InputError(
        "a row needs a list 'messages' (transformers), a list 'conversations' (LLaVA), or an image "
        "with a 'caption' or 'text'",
        ErrorCode.INVALID_FORMAT,
    )


def _images(row: Mapping[str, Any]) -> list[Any]:
    values = [row[key] for key in ("image", "images") if row.get(key) is not None]
    if len(values) > 1:
        raise InputError("a row has both 'image' and 'images'", ErrorCode.CONFLICT)
    if not values:
        return []
    return values[0] if isinstance(values[0], list) else values


def _turns(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise InputError(f"{key!r} must be a list, not {row[key]!r:.80}", ErrorCode.INVALID_FORMAT)
    return row[key]


def _parse_caption(row: Mapping[str, Any], images: list[Message], _: ImageReader) -> list[Message]:
    if len(images) != 1:
        raise InputError(
            f"a caption needs one image, but the row has {len(images)}",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    caption = next(row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str))
    question = {"role": "user", "content": images}
    return [question, {"role": "assistant", "content": caption.strip()}]


def _parse_llava(row: Mapping[str, Any], images: list[Message], _: ImageReader) -> list[Message]:
    turns = [_llava_turn(turn) for turn in _turns(row, "conversations")]
    placeholders = sum(len(_PLACEHOLDER.findall(text)) for _, text in turns)
    if placeholders != len(images):
        raise InputError(
            f"the text has {placeholders} image placeholders, but the row has {len(images)} images",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    unused = iter(images)
    return [{"role": role, "content": _llava_content(text, unused)} for role, text in turns]


def _llava_turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise InputError(
            "a turn must be an object with 'from' and a string 'value'", ErrorCode.INVALID_TYPE
        )
    role = turn.get("from")
    if not isinstance(role, str) or role not in _LLAVA_ROLES:
        raise InputError(f"'from' is {role!r}; it must be 'human' or 'gpt'", ErrorCode.INVALID_ROLE)
    return _LLAVA_ROLES[role], turn["value"]


def _llava_content(text: str, images: Iterator[Message]) -> str | list[Message]:
    """The content of a turn; takes an image for each placeholder."""
    segments = _PLACEHOLDER.split(text)
    if len(segments) == 1:
        return text
    if len(segments) == 2:
        stripped = "".join(segments).strip()
        segments = ["", f"\n{stripped}" if stripped else ""]
    else:
        segments = [segments[0].lstrip(), *segments[1:-1], segments[-1].rstrip()]
    parts: list[Message] = []
    for i, segment in enumerate(segments):
        if i:
            parts.append(next(images))
        if segment:
            parts.append({"type": "text", "text": segment})
    return parts


def _parse_messages(
    row: Mapping[str, Any], images: list[Message], read_image: ImageReader
) -> list[Message]:
    unused = iter(images)
    messages = [_message(message, unused, read_image) for message in _turns(row, "messages")]
    if remaining := len(list(unused)):
        raise InputError(
            f"the row has {len(images)} images, but its messages have {len(images) - remaining} "
            'parts {"type": "image"}',
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    return messages


def _message(message: Any, images: Iterator[Message], read_image: ImageReader) -> Any:
    # Other values are not changed here: `validated` reports them.
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [_part(part, images, read_image) for part in message["content"]]
    return {**message, "content": parts}


def _part(part: Any, images: Iterator[Message], read_image: ImageReader) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return part
    # Arrow tables have every key in every part, with None where it is absent.
    present = {key: value for key, value in part.items() if value is not None}
    if present.keys() == {"type"}:
        return next(images, present)
    for key in ("path", "image"):
        if key in present:
            image = read_image(present[key])
            return {name: value for name, value in present.items() if name != key} | image
    return present


_PARSERS = {"messages": _parse_messages, "conversations": _parse_llava, "caption": _parse_caption}
