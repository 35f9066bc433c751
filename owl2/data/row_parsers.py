"""Rows to samples, independent of the file format.

The keys of a row determine its format, see `row_formats`::

    messages [+ images]         transformers, OpenAI, ms-swift, LlamaFactory, DocOwl
    conversations [+ image]     LLaVA, ShareGPT, Qwen-VL: [{"from": "human" | "gpt", "value": ...}]
    query, response             ms-swift
    instruction, input, output  LlamaFactory
    text with Human: and AI:    mPLUG-Owl
    caption | text + image      an image or a video and its caption, which is the answer

In a text, `<image>` or `<|image|>` is the next of the row's images, and Qwen-VL's
`<img>PATH</img>` is an image itself; a bare {"type": "image"} part is the next one as well.
`<video>`, `<|video|>` and {"type": "video"} are the next of the videos under `video` or `videos`;
`<image>` as well in a row without images, as in the files of LLaVA-Video. A `system` (or
`system_prompt`) text becomes a system message, and an answer with `"loss": false` (OpenAI:
`"weight": 0`) is a part of the prompt. Rows of scoring models have an `OpinionLabel`. Media that
are not read are refused, see `media_keys`. Images and videos are opened when a sample is used.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from owl2.data.media_keys import refuse_markers, unused_keys
from owl2.data.row_formats import IMAGE_PLACEHOLDER, find_format, make_message
from owl2.data.sample import OPINION_KEYS, Message, OpinionLabel, Sample, validated
from owl2.errors import ErrorCode, InputError, error_prefix, shorten
from owl2.files import expand_user
from owl2.processing.message_parts import (
    IMAGE_TOKEN,
    MEDIA,
    TOKENS,
    VIDEO_TOKEN,
    move_images_first,
    text_to_parts,
)
from owl2.processing.messages import IMAGE_KEYS, VIDEO_KEYS
from owl2.processing.video import PER_SECOND, VIDEO_SUFFIXES

_VIDEO_PLACEHOLDER = re.compile(r"<video>|<\|video\|>")
_QWEN_IMAGE = re.compile(r"(Picture \d+: ?)?<img>\s*([^<>\n]+\.\w{2,5}|[^<>\s]*/[^<>\s]+)\s*</img>")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
SOURCE_KEYS = ("image", "images", "video", "videos")
_SYSTEM_KEYS = ("system", "system_prompt", "system_instruction")
# An image of a row to a message part. Raises `InputError` for other values.
ImageReader = Callable[[Any], Message]


def parse_row(
    row: Any, source: str, read_image: ImageReader, attached: Sequence[Any] = ()
) -> Sample:
    """A row of any format as a validated sample.

    The text of LLaVA, Qwen-VL and mPLUG-Owl rows is converted as in the authors' training code
    (Specification §1.5): a turn with one image becomes the image, a line break and the stripped
    text, wherever the placeholder was. In a turn with several images the placeholders keep their
    positions, because the text between them refers to them; line breaks between leading images are
    removed by the processor (`insert_image_newlines`). Other texts are not changed.

    Args:
        attached: Images stored next to the row; image names in the row are then ignored.

    Raises:
        InputError: Starts with `source`. The row has no known format or several, the number of
            images does not fit, it has media that are not read, or see `validated`.
    """
    with error_prefix(f"{source}: "):
        if not isinstance(row, Mapping):
            raise InputError(
                f"a row must be an object, not {type(row).__name__}", ErrorCode.INVALID_FORMAT
            )
        row_format = find_format(row)
        messages = row_format.read(row)
        if system := next((row[key] for key in _SYSTEM_KEYS if row.get(key)), None):
            messages.insert(0, make_message({}, "system", system))
        images, videos = list(attached or _sources(row, "image")), _sources(row, "video")
        names = [name for text in _user_texts(messages) for _, name in _QWEN_IMAGE.findall(text)]
        if images and names:
            raise InputError("the row has images both as a key and as <img>", ErrorCode.CONFLICT)
        images += names
        split = partial(
            _split,
            # Nothing refers to the label of a single image.
            qwen_image=r"\1<image>" if len(names) > 1 else "<image>",
            has_images=bool(images),
            has_videos=bool(videos),
            moves_image=row_format.moves_image,
        )
        for message in messages:
            marked = any(map(_has_placeholder, _user_texts([message])))
            message["content"] = _to_parts(message, split, read_image)
            parts = _parts(message)
            if marked and parts != move_images_first(parts):
                message["interleave_images"] = True
        _insert_sources(messages, "image", [_image_or_video(read_image(image)) for image in images])
        _insert_sources(messages, "video", [_as_video(read_image(video)) for video in videos])
        has_images = any(part.get("type") != "text" for m in messages for part in _parts(m))
        known = {*row_format.required, *row_format.optional, *_SYSTEM_KEYS, *SOURCE_KEYS}
        known |= {*OPINION_KEYS, "task_type"}
        unused = unused_keys(row, known, has_images, is_attached=bool(attached))
        refuse_markers(_user_texts(messages), has_images)
        opinion = OpinionLabel.from_row(row)
    is_description = row.get("task_type") == "description"
    return validated(Sample(messages, source, unused, opinion, is_description))


def image_reader(root: Path) -> ImageReader:
    """Reads image names as paths relative to `root`; URLs and base64 are not changed."""
    return partial(_read_image, root)


def _read_image(root: Path, name: Any) -> Message:
    if not isinstance(name, str) or not name:
        raise InputError(
            f"an image must be a path, a URL or base64, not {shorten(name)}",
            ErrorCode.INVALID_TYPE,
        )
    if _SCHEME.match(name):
        return {"type": "image", "url": name}
    path = root / expand_user(name)
    if _BASE64.fullmatch(name) and not os.path.exists(path):
        return {"type": "image", "base64": name}
    return {"type": "image", "path": str(path)}


def image_root(directory: Path, images: str | Path | None) -> Path:
    """The root of image paths: `images`, else `directory`.

    Raises:
        InputError: It is not a directory.
    """
    root = directory if images is None else expand_user(images)
    if not root.is_dir():
        raise InputError(f"the image directory {root} does not exist", ErrorCode.FILE_NOT_FOUND)
    return root


def _sources(row: Mapping[str, Any], kind: str) -> list[Any]:
    values = [row[key] for key in (kind, f"{kind}s") if row.get(key) not in (None, "", [])]
    if len(values) > 1:
        raise InputError(f"a row has both {kind!r} and '{kind}s'", ErrorCode.CONFLICT)
    if not values:
        return []
    return values[0] if isinstance(values[0], list) else values


# ------------------------------------------------------------------ images of messages


def _parts(message: Message) -> list[Mapping[str, Any]]:
    """The parts of a message. Other contents are ignored here: `validated` reports them."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []


def _user_texts(messages: Sequence[Message]) -> list[str]:
    parts = (part for m in messages if m["role"] == "user" for part in _parts(m))
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]


def _has_placeholder(text: str) -> bool:
    return bool(IMAGE_PLACEHOLDER.search(text) or _VIDEO_PLACEHOLDER.search(text))


def _split(
    text: str, qwen_image: str, has_images: bool, has_videos: bool, moves_image: bool
) -> list[Message]:
    """A text as parts; placeholders become {"type": "image"} and {"type": "video"}."""
    # Without images, <image>...</image> is XML, and <video> may be HTML.
    is_xml = not has_images and "</image>" in text
    text = _QWEN_IMAGE.sub(qwen_image, text)
    if has_videos:
        text = _VIDEO_PLACEHOLDER.sub(VIDEO_TOKEN, text)
    if not is_xml:
        is_image = has_images or not has_videos or VIDEO_TOKEN in text
        text = IMAGE_PLACEHOLDER.sub(IMAGE_TOKEN if is_image else VIDEO_TOKEN, text)
    placeholders = len(MEDIA.findall(text))
    if moves_image and placeholders == 1:
        before, kind, after = MEDIA.split(text)
        stripped = (before + after).strip()
        text = TOKENS[kind] + (f"\n{stripped}" if stripped else "")
    elif moves_image and placeholders:
        text = text.strip()
    return text_to_parts(text)


def _to_parts(
    message: Message, split: Callable[..., list[Message]], read_image: ImageReader
) -> Any:
    """The content as parts with their images; a string without images remains one."""
    content = message["content"]
    if message["role"] != "user":  # <img> in an answer is HTML
        split = partial(split, qwen_image=r"\g<0>")
    if isinstance(content, str):
        parts = split(content)
        return parts if any(part["type"] != "text" for part in parts) else content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    parts = []
    for part in content:
        # Arrow tables have every key in every part, with None where it is absent.
        part = {key: value for key, value in part.items() if value is not None}
        if "type" not in part:  # Qwen's API: {"image": ...}, {"video": ...} or {"text": ...}
            part |= {"type": next((key for key in ("text", *TOKENS) if key in part), None)}
        if part["type"] == "text" and isinstance(part.get("text"), str):
            unused_keys(part, ("type", "text"), has_images=False, where="a part")
            parts += split(part["text"]) or [part]
        else:
            parts.append(_resolve(part, read_image))
    return parts


def _resolve(part: Message, read_image: ImageReader) -> Message:
    """The part with its path resolved; URLs and base64 are not changed."""
    kind = str(part["type"]).removesuffix("_url")
    if kind not in TOKENS:
        return part
    for key in ("path", kind, "url", f"{kind}_url"):
        value = part.get(key)
        if key == f"{kind}_url" and isinstance(value, Mapping):
            value = value.get("url")
        is_name = key in ("path", kind) or (isinstance(value, str) and not _SCHEME.match(value))
        if value is not None and is_name:
            others = {name: one for name, one in part.items() if name not in (key, "type")}
            known = IMAGE_KEYS if kind == "image" else (*VIDEO_KEYS, "num_frames")
            unused_keys(others, known, has_images=True, where="a part")
            found = read_image(value)
            return others | (found if kind == "image" else _as_video(found))
    return part


def _as_video(image: Message) -> Message:
    """The part of a video, from the part that an `ImageReader` returned for its name."""
    return {"video" if key == "image" else key: value for key, value in image.items()} | {
        "type": "video"
    }


def _image_or_video(image: Message) -> Message:
    """The part of a file in `image`. Q-Align's rows name videos like images."""
    if Path(image.get("path", "")).suffix.lower() not in VIDEO_SUFFIXES:
        return image
    return _as_video(image) | {"num_frames": PER_SECOND}


def _insert_sources(messages: list[Message], kind: str, sources: list[Message]) -> None:
    """Replaces each part {"type": kind} by the next of `sources`."""
    bare = {"type": kind}
    count = sum(part == bare for message in messages for part in _parts(message))
    if count != len(sources):
        raise InputError(
            f"the messages have {count} {kind} placeholders, but the row has {len(sources)} "
            f"{kind}s",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    unused = iter(sources)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [next(unused) if p == bare else p for p in message["content"]]
