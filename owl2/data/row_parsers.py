"""Rows → Samples; where the rows lie is no matter here: see `rows`, `shards`, `tables`.

What a row is, its keys say::

    messages [+ images]        transformers' messages; a bare {"type": "image"} part stands for the
                               next of `images`
    conversations [+ image]    LLaVA's: [{"from": "human" | "gpt", "value": ...}, ...]; <image> in
                               a text stands for the next of `image`
    caption | text + image     an image and what is on it: the question is the image alone

Images are opened only when a sample is used.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from owl2.data.sample import Message, Sample, validated
from owl2.errors import ErrorCode, InputError

# LLaVA's files write the first, the authors of mPLUG-Owl2 the second.
_IMAGE_MARK = re.compile(r"<image>|<\|image\|>")
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_IMAGE_KEYS = ("image", "images")
_CAPTION_KEYS = ("caption", "text")


# What a row gives as an image → the part of a message that holds it. For what is no image it
# raises `InputError`, which need not name the row.
ImageReader = Callable[[Any], Message]


def parse_row(row: Any, source: str, image: ImageReader, given: Sequence[Any] = ()) -> Sample:
    """A row of any of the three kinds → its Sample, validated.

    `given`: images that lie beside the row; then names of images in the row say nothing.

    LLaVA's text becomes what the authors' training code makes of it (SPEC 1.5): a turn with one
    image is the image, a line break, and the stripped text, wherever the mark stood. With
    several images in a turn the marks stay where they are, because the words between tell which
    is which. A turn without images stays as it is, spaces included; so does all in messages.

    Raises:
        InputError: that begins with `source`: none or several of the three kinds, another number of
            images than the row has places for, or see `validated`.
    """
    try:
        if not isinstance(row, Mapping):
            raise InputError(f"a row must be an object, not a {type(row).__name__}.")
        images = [image(one) for one in given or _images(row)]
        messages = _MESSAGES[_kind(row)](row, images, image)
    except InputError as error:
        raise InputError(f"{source}: {error}", error.code) from error
    return validated(Sample(messages, source))


class ImagePathResolver:
    """Reads names of images as paths that start from a directory; urls stay what they are."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, given: Any, /) -> Message:
        if not isinstance(given, str) or not given:
            raise InputError(f"an image must be a path or a url, not {given!r:.80}.")
        if given.startswith(("http://", "https://", "data:")):
            return {"type": "image", "url": given}
        return {"type": "image", "path": str(self.root / given)}


def image_root(path: Path, images: str | Path | None) -> Path:
    """The directory that image paths start from: `images`, else the one that `path` lies in.

    Raises:
        InputError: there is no such directory.
    """
    root = path.parent if images is None else Path(images)
    if not root.is_dir():
        raise InputError(f"{root}, where the images of {path} should be, is not a directory.")
    return root


def _kind(row: Mapping[str, Any]) -> str:
    kinds = [key for key in ("messages", "conversations") if row.get(key) is not None]
    if len(kinds) == 2:
        raise InputError("a row holds 'messages' and 'conversations': which are to be learned?")
    if kinds:
        return kinds[0]
    if any(isinstance(row.get(key), str) for key in _CAPTION_KEYS):
        return "caption"
    raise InputError(
        "a row must be an object with a list 'messages' (transformers'), a list 'conversations' "
        "(LLaVA's), or an image with a 'caption' or 'text'."
    )


def _images(row: Mapping[str, Any]) -> list[Any]:
    named = [row[key] for key in _IMAGE_KEYS if row.get(key) is not None]
    if len(named) > 1:
        raise InputError("a row names its images twice, under 'image' and 'images'.")
    if not named:
        return []
    return named[0] if isinstance(named[0], list) else named


def _turns(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise InputError(f"a row must have a list {key!r}, not {row[key]!r:.80}.")
    return row[key]


# ------------------------------------------------------------------ captions


def _from_caption(row: Mapping[str, Any], images: list[Message], _: ImageReader) -> list[Message]:
    if len(images) != 1:
        raise InputError(
            f"a caption needs one image, and the row has {len(images)}.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    caption = next(row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str))
    question = {"role": "user", "content": [images[0]]}
    return [question, {"role": "assistant", "content": caption.strip()}]


# ------------------------------------------------------------------ LLaVA's conversations


def _from_llava(row: Mapping[str, Any], images: list[Message], _: ImageReader) -> list[Message]:
    turns = [_llava_turn(turn) for turn in _turns(row, "conversations")]
    marked = sum(len(_IMAGE_MARK.findall(text)) for _, text in turns)
    if marked != len(images):
        raise InputError(
            f"the text marks {marked} images with <image>, and the row has {len(images)}; "
            "these must be the same.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    unused = iter(images)
    return [{"role": role, "content": _llava_content(text, unused)} for role, text in turns]


def _llava_turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise InputError(
            "a turn must be an object with 'from' and a string 'value'.", ErrorCode.INVALID_TYPE
        )
    role = turn.get("from")
    if not isinstance(role, str) or role not in _LLAVA_ROLES:
        raise InputError(
            f"a turn is from {role!r}; it must be from 'human' or 'gpt'.", ErrorCode.INVALID_ROLE
        )
    return _LLAVA_ROLES[role], turn["value"]


def _llava_content(text: str, images: Iterator[Message]) -> str | list[Message]:
    """The text of a turn → its content; takes as many of `images` as the text marks."""
    pieces = _IMAGE_MARK.split(text)
    if len(pieces) == 1:
        return text
    if len(pieces) == 2:
        words = "".join(pieces).strip()
        pieces = ["", f"\n{words}" if words else ""]
    else:
        pieces = [pieces[0].lstrip(), *pieces[1:-1], pieces[-1].rstrip()]
    parts: list[Message] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(next(images))
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


# ------------------------------------------------------------------ transformers' messages


def _from_messages(
    row: Mapping[str, Any], images: list[Message], image: ImageReader
) -> list[Message]:
    unused = iter(images)
    messages = [_read_message(message, unused, image) for message in _turns(row, "messages")]
    if left := len(list(unused)):
        raise InputError(
            f"the row has {len(images)} images, and its messages have places for "
            f'{len(images) - left}: each needs a part {{"type": "image"}}.',
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    return messages


def _read_message(message: Any, images: Iterator[Message], image: ImageReader) -> Any:
    # What is no message or no part is left as it is: `validated` says where it stands.
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [_read_part(part, images, image) for part in message["content"]]
    return {**message, "content": parts}


def _read_part(part: Any, images: Iterator[Message], image: ImageReader) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return part
    # Tables have every key in every part, empty where it says nothing.
    said = {key: value for key, value in part.items() if value is not None}
    if said.keys() == {"type"}:
        return next(images, said)
    for key in ("path", "image"):
        if key in said:
            return {name: value for name, value in said.items() if name != key} | image(said[key])
    return said


_MESSAGES = {"messages": _from_messages, "conversations": _from_llava, "caption": _from_caption}
