"""Rows to samples, independent of the file format.

The keys of a row determine its format, see `FORMATS`::

    messages [+ images]         transformers, OpenAI, ms-swift, LlamaFactory, DocOwl
    conversations [+ image]     LLaVA, ShareGPT, Qwen-VL: [{"from": "human" | "gpt", "value": ...}]
    query, response             ms-swift
    instruction, input, output  LlamaFactory
    text with Human: and AI:    mPLUG-Owl
    caption | text + image      an image and its caption: the user turn is the image alone

In a text, `<image>` or `<|image|>` is the next of the row's images, and Qwen-VL's
`<img>PATH</img>` is an image itself; a bare {"type": "image"} part is the next one as well. A
`system` (or `system_prompt`) text becomes a system message, and an answer with `"loss": false`
(OpenAI: `"weight": 0`) is a part of the prompt. Rows of scoring models have an `OpinionLabel`.
Media that are not read are refused, see `media_keys`. Images are opened when a sample is used.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from owl2.data.media_keys import refuse_markers, unused_keys
from owl2.data.sample import OPINION_KEYS, Message, OpinionLabel, Sample, validated
from owl2.errors import ErrorCode, InputError, shorten
from owl2.files import expand_user
from owl2.processing.messages import IMAGE_KEYS, IMAGE_TOKEN, move_images_first, text_to_parts

# LLaVA's files write the first, mPLUG-Owl2's files the second.
_PLACEHOLDER = re.compile(r"<image>|<\|image\|>")
_QWEN_IMAGE = re.compile(r"(Picture \d+: ?)?<img>\s*([^<>\n]+\.\w{2,5}|[^<>\s]*/[^<>\s]+)\s*</img>")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_SYSTEM_KEYS = ("system", "system_prompt", "system_instruction")
# ShareGPT's files have all of these, and others (bing, bard).
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OWL_TURN = re.compile(r"(?:^|\n)(Human|AI):[ \t]?")
# The start of every row of mPLUG-Owl. The format of mPLUG-Owl2 has no system text.
OWL_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_NO_FORMAT = (
    "a row needs a list 'messages' (transformers), a list 'conversations' (LLaVA), or an image "
    "with a 'caption' or 'text'"
)

# An image of a row to a message part. Raises `InputError` for other values.
ImageReader = Callable[[Any], Message]


class Format(NamedTuple):
    """A format of rows.

    Attributes:
        read: The messages of a row, with placeholders in their texts.
        required: The keys of a row in this format: a list, or strings.
        optional: Other keys that it reads, without those of images and of the system text.
        moves_image: The single image of a turn is moved before the text, see `parse_row`.
    """

    read: Callable[[Mapping[str, Any]], list[Message]]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    moves_image: bool = False


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
    try:
        if not isinstance(row, Mapping):
            raise InputError(
                f"a row must be an object, not {type(row).__name__}", ErrorCode.INVALID_FORMAT
            )
        row_format = _find_format(row)
        messages = row_format.read(row)
        if system := next((row[key] for key in _SYSTEM_KEYS if row.get(key)), None):
            messages.insert(0, _message({}, "system", system))
        images = list(attached or _images(row))
        names = [name for text in _user_texts(messages) for _, name in _QWEN_IMAGE.findall(text)]
        if images and names:
            raise InputError("the row has images both as a key and as <img>", ErrorCode.CONFLICT)
        images += names
        split = partial(
            _split,
            # Nothing refers to the label of a single image.
            qwen_image=r"\1<image>" if len(names) > 1 else "<image>",
            has_images=bool(images),
            moves_image=row_format.moves_image,
        )
        for message in messages:
            marked = any(map(_PLACEHOLDER.search, _user_texts([message])))
            message["content"] = _to_parts(message, split, read_image)
            parts = _parts(message)
            if marked and parts != move_images_first(parts):
                message["interleave_images"] = True
        _insert_images(messages, [read_image(image) for image in images])
        has_images = any(part.get("type") != "text" for m in messages for part in _parts(m))
        known = {*row_format.required, *row_format.optional, *_SYSTEM_KEYS, "image", "images"}
        known |= {*OPINION_KEYS, "task_type"}
        unused = unused_keys(row, known, has_images, is_attached=bool(attached))
        refuse_markers(_user_texts(messages), has_images)
        opinion = OpinionLabel.from_row(row)
    except InputError as error:
        raise InputError(f"{source}: {error}", error.code) from error
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


def _images(row: Mapping[str, Any]) -> list[Any]:
    values = [row[key] for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if len(values) > 1:
        raise InputError("a row has both 'image' and 'images'", ErrorCode.CONFLICT)
    if not values:
        return []
    return values[0] if isinstance(values[0], list) else values


# ------------------------------------------------------------------ formats


def _find_format(row: Mapping[str, Any]) -> Format:
    lists = [key for key in ("messages", "conversations") if row.get(key) is not None]
    if len(lists) > 1:
        raise InputError("a row has both 'messages' and 'conversations'", ErrorCode.CONFLICT)
    for name, row_format in FORMATS.items():
        if name in lists or all(isinstance(row.get(key), str) for key in row_format.required):
            return row_format
    raise InputError(_NO_FORMAT, ErrorCode.INVALID_FORMAT)


def require_format(columns: Sequence[str], source: str) -> None:
    """Raises `InputError` if no row with these columns has a known format."""
    if not any(set(row_format.required) <= set(columns) for row_format in FORMATS.values()):
        names = ", ".join(sorted(columns))
        message = f"{source} has the columns {names}: {_NO_FORMAT}"
        raise InputError(message, ErrorCode.INVALID_FORMAT)


def _read_turns(row: Mapping[str, Any], key: str) -> list[Message]:
    """The turns in the list `key`, with the keys of transformers or, in LLaVA's list, of LLaVA."""
    if not isinstance(row[key], list):
        raise InputError(
            f"{key!r} must be a list, not {shorten(row[key])}", ErrorCode.INVALID_FORMAT
        )
    messages: list[Message] = []
    for i, turn in enumerate(row[key]):
        if not isinstance(turn, Mapping):
            raise InputError(
                f"{key}[{i}] must be an object, not {shorten(turn)}", ErrorCode.INVALID_TYPE
            )
        role, content = turn.get("role"), turn.get("content")
        if key == "conversations":
            role, content = turn.get("from", role), turn.get("value", content) or ""
            if not isinstance(content, str):
                raise InputError(
                    f"'value' of {key}[{i}] must be a string, not {shorten(content)}",
                    ErrorCode.INVALID_TYPE,
                )
            if not isinstance(role, str) or role not in ROLES:
                raise InputError(
                    f"'from' is {shorten(role)}; it must be 'human' or 'gpt'",
                    ErrorCode.INVALID_ROLE,
                )
            role, last = ROLES[role], messages[-1] if messages else {}
            # In UReader's files an image is a turn of its own.
            is_image = "content" in last and not _PLACEHOLDER.sub("", last["content"]).strip()
            if role == last.get("role") == "user" and is_image:
                last["content"] += f"\n{content}"
                continue
        messages.append(_message(turn, role, content))
    return messages


def _message(turn: Mapping[str, Any], role: Any, content: Any) -> Message:
    """A turn as a message; `"loss": False` and `"interleave_images": True` are kept."""
    known = ("from", "value", "role", "content", "interleave_images")
    unused_keys(turn, known, has_images=False, where="a turn")
    message = {"role": role, "content": content}
    for key in ("loss", "weight"):
        value = turn.get(key)
        if value not in (None, 0, 1) or (value and role != "assistant"):
            raise InputError(
                f"{key!r} of a turn of {role!r} is {shorten(value)}: only answers contribute to "
                "the loss, with true or not at all",
                ErrorCode.UNSUPPORTED,
            )
        if value is not None and not value and role == "assistant":
            message["loss"] = False
    if turn.get("interleave_images") and role == "user":
        message["interleave_images"] = True
    return message


def _read_rounds(
    row: Mapping[str, Any], question: str, answer: str, more: str = ""
) -> list[Message]:
    """A question and its answer under two keys, after the rounds of `history`."""
    last = "\n".join(row[key] for key in (question, more) if row.get(key))
    rounds = [*(row.get("history") or []), [last, row[answer]]]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise InputError("'history' must be a list of [question, answer]", ErrorCode.INVALID_FORMAT)
    roles = ("user", "assistant")
    return [_message({}, roles[i], pair[i]) for pair in rounds for i in range(2)]


def _read_caption(row: Mapping[str, Any], key: str) -> list[Message]:
    if key == "text" and {"Human", "AI"} <= set(_OWL_TURN.findall(row[key])):
        return _read_owl(row[key])
    for question in ("question", "query", "prompt", "instruction"):
        if row.get(question):
            raise InputError(
                f"a row has {key!r} and {question!r}, but no known format has both",
                ErrorCode.INVALID_FORMAT,
            )
    image = [{"type": "image"}]
    return [_message({}, "user", image), _message({}, "assistant", row[key].strip())]


def _read_owl(text: str) -> list[Message]:
    """The turns of an mPLUG-Owl row: "Human: <image>\\nHuman: question\\nAI: answer\\n..."."""
    system, *fields = _OWL_TURN.split(text)
    messages: list[Message] = []
    if system.strip() not in ("", OWL_SYSTEM):
        messages.append(_message({}, "system", system.strip()))
    for name, content in zip(fields[::2], fields[1::2], strict=True):
        role = "user" if name == "Human" else "assistant"
        if role == "user" and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{content.strip()}"
        else:
            messages.append(_message({}, role, content.strip()))
    return messages


FORMATS: dict[str, Format] = {
    "messages": Format(partial(_read_turns, key="messages"), ("messages",)),
    "conversations": Format(
        partial(_read_turns, key="conversations"), ("conversations",), moves_image=True
    ),
    "query": Format(
        partial(_read_rounds, question="query", answer="response"),
        ("query", "response"),
        ("history",),
    ),
    "instruction": Format(
        partial(_read_rounds, question="instruction", answer="output", more="input"),
        ("instruction", "output"),
        ("input", "history"),
    ),
    "caption": Format(partial(_read_caption, key="caption"), ("caption",)),
    "text": Format(partial(_read_caption, key="text"), ("text",), moves_image=True),
}


# ------------------------------------------------------------------ images of messages


def _parts(message: Message) -> list[Mapping[str, Any]]:
    """The parts of a message. Other contents are ignored here: `validated` reports them."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []


def _user_texts(messages: Sequence[Message]) -> list[str]:
    parts = (part for m in messages if m["role"] == "user" for part in _parts(m))
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]


def _split(text: str, qwen_image: str, has_images: bool, moves_image: bool) -> list[Message]:
    """A text as parts; placeholders become {"type": "image"}."""
    # Without images, <image>...</image> is XML.
    is_xml = not has_images and "</image>" in text
    text = _QWEN_IMAGE.sub(qwen_image, text)
    segments = text.split(IMAGE_TOKEN) if is_xml else _PLACEHOLDER.split(text)
    if moves_image and len(segments) == 2:
        stripped = "".join(segments).strip()
        segments = ["", f"\n{stripped}" if stripped else ""]
    elif moves_image and len(segments) > 2:
        segments = [segments[0].lstrip(), *segments[1:-1], segments[-1].rstrip()]
    return text_to_parts(IMAGE_TOKEN.join(segments))


def _to_parts(
    message: Message, split: Callable[..., list[Message]], read_image: ImageReader
) -> Any:
    """The content as parts with their images; a string without images remains one."""
    content = message["content"]
    if message["role"] != "user":  # <img> in an answer is HTML
        split = partial(split, qwen_image=r"\g<0>")
    if isinstance(content, str):
        parts = split(content)
        return parts if any(part["type"] == "image" for part in parts) else content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    parts = []
    for part in content:
        # Arrow tables have every key in every part, with None where it is absent.
        part = {key: value for key, value in part.items() if value is not None}
        if "type" not in part:  # Qwen's API: {"image": ...} or {"text": ...}
            part |= {"type": next((key for key in ("text", "image") if key in part), None)}
        if part["type"] == "text" and isinstance(part.get("text"), str):
            unused_keys(part, ("type", "text"), has_images=False, where="a part")
            parts += split(part["text"]) or [part]
        else:
            parts.append(_image_part(part, read_image))
    return parts


def _image_part(part: Message, read_image: ImageReader) -> Message:
    """The part with its path resolved; URLs and base64 are not changed."""
    for key in ("path", "image", "url", "image_url"):
        value = part.get(key)
        if key == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        is_name = key in ("path", "image") or (isinstance(value, str) and not _SCHEME.match(value))
        if part["type"] in ("image", "image_url") and value is not None and is_name:
            others = {name: one for name, one in part.items() if name not in (key, "type")}
            unused_keys(others, IMAGE_KEYS, has_images=True, where="a part")
            return others | read_image(value)
    return part


def _insert_images(messages: list[Message], images: list[Message]) -> None:
    """Replaces each part {"type": "image"} by the next of `images`."""
    bare = {"type": "image"}
    count = sum(part == bare for message in messages for part in _parts(message))
    if count != len(images):
        raise InputError(
            f"the messages have {count} image placeholders, but the row has {len(images)} images",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    unused = iter(images)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [next(unused) if p == bare else p for p in message["content"]]
