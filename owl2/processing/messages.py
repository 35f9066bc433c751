"""Messages to validated turns: roles, parts and images.

::

    messages ──parse_messages──► ParsedMessages (turns, images) ──chat_template.render──► text
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError

IMAGE_TOKEN = "<|image|>"
_LEADING_IMAGES = re.compile(rf"\s*(?:{re.escape(IMAGE_TOKEN)}\s*)+")
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ParsedMessages:
    """Validated messages.

    Attributes:
        turns: Messages whose parts are `{"type": "text", "text": str}` and `{"type": "image"}`. An
            answer with `"loss": False` has no labels. The images of a turn with
            `"interleave_images": True` keep their places, see `move_images_first`.
        images: Sources of the images for `load_image`, in order of appearance, not yet opened. A
            part `{"type": "image"}` without a source has none.
    """

    turns: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]

    @property
    def is_open(self) -> bool:
        """Whether the last turn has no answer."""
        return bool(self.turns[-1]["role"] == "user")

    @property
    def has_loss(self) -> list[bool]:
        """Whether each answer has labels."""
        return [turn.get("loss", True) for turn in self.turns if turn["role"] == "assistant"]

    def without_end_tokens(self, eos_token: str) -> "ParsedMessages":
        """The conversation without `eos_token` at the end of an answer: the template writes it.

        Raises:
            InputError: The answer has no other text.
        """
        end = re.compile(rf"(?:\s*{re.escape(eos_token)})+\s*$")
        turns = []
        for turn in self.turns:
            text = content_to_text(turn["content"]) if turn["role"] == "assistant" else ""
            if found := end.search(text):
                if not found.start():
                    raise InputError(
                        f"An answer is empty: its text is only {eos_token}.",
                        ErrorCode.EMPTY_MESSAGE,
                    )
                turn = turn | {"content": [{"type": "text", "text": text[: found.start()]}]}
            turns.append(turn)
        return ParsedMessages(tuple(turns), self.images)


def parse_messages(
    messages: Sequence[Message] | ParsedMessages, merge_roles: bool = False
) -> ParsedMessages:
    """Validate messages in the format of transformers; `ParsedMessages` are returned unchanged.

    Roles alternate, starting with `user` after optional `system` messages. A content is a string
    or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image" | "url" |
    "path" | "base64": ...}` or OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`.
    `<|image|>` in a text marks an image as well. If the texts of a message mark as many images as
    the message has parts with an image, these are the marked ones.

    Args:
        merge_roles: Accept any order of roles, see `_merge_roles`.

    Raises:
        InputError: A role is unknown or misplaced, a turn is empty, a part has another type, or an
            answer contains an image. The error names the message.
    """
    if isinstance(messages, ParsedMessages):
        return messages
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            "Messages must be a list of {'role': ..., 'content': ...}, not "
            f"{type(messages).__name__}.",
            ErrorCode.INVALID_TYPE,
        )
    images: list[Any] = []
    turns = [
        _read_message(message, f"messages[{index}]", images, merge_roles)
        for index, message in enumerate(messages)
    ]
    if merge_roles:
        turns = _merge_roles(turns)
    expected = "user"
    for index, turn in enumerate(turns):
        role = turn["role"]
        is_first = role == "system" and all(one["role"] == role for one in turns[:index])
        if role != expected and not is_first:
            raise InputError(
                f"messages[{index}] has the role {role!r} instead of {expected!r}: after optional "
                "system messages, user and assistant alternate.",
                ErrorCode.INVALID_ROLE,
            )
        expected = "assistant" if role == "user" else "user"
    if not turns or turns[-1]["role"] == "system":
        raise InputError(
            "The messages are empty or only a system prompt: add a user message.",
            ErrorCode.INVALID_ROLE if turns else ErrorCode.EMPTY_MESSAGE,
        )
    return ParsedMessages(tuple(turns), tuple(images))


def validate_prompt(messages: Sequence[Message] | ParsedMessages) -> ParsedMessages:
    """Parse messages that must end with a user message. An image without text is one.

    Raises:
        InputError: As `parse_messages`; also if the last message is an answer.
    """
    parsed = parse_messages(messages, merge_roles=True)
    if not parsed.is_open:
        raise InputError(
            "The last message is an answer; the conversation must end with a user message.",
            ErrorCode.INVALID_ROLE,
        )
    return parsed


def user_message(text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """The user message of a question and its images, as `Engine.chat` takes it.

    Images replace the `<|image|>` placeholders of the text and keep these places, or precede the
    text if it has none.

    Raises:
        InputError: The numbers of placeholders and images differ.
    """
    count = text.count(IMAGE_TOKEN)
    places = {"interleave_images": True} if count else {}
    if not count:
        text = IMAGE_TOKEN * len(images) + text
    elif count != len(images):
        raise InputError(
            f"The question has {count} {IMAGE_TOKEN} placeholder(s) for {len(images)} image(s): "
            "each placeholder takes one image.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    unused = iter(images)
    parts = [
        {**part, "image": next(unused)} if part["type"] == "image" else part
        for part in text_to_parts(text)
    ]
    return {"role": "user", "content": parts, **places}


def move_images_first(parts: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The parts of a user message with its images before its texts; both keep their order.

    Models of the family are trained with images before the text. `<|image|>` in a text is a place
    that the author of the text chose; such a message is not changed. Texts that an image separated
    become lines, and white space before a last image is removed.
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
        if IMAGE_TOKEN in text:
            return list(parts)
        if is_separated and texts and not (texts[-1][-1:].isspace() or text[:1].isspace()):
            text = f"\n{text}"
        texts.append(text)
        is_separated = False
    if is_separated:
        texts[-1] = texts[-1].rstrip()
    return [*images, *({"type": "text", "text": text} for text in texts if text)]


def order_images(conversation: ParsedMessages, interleave_images: bool) -> ParsedMessages:
    """Apply `move_images_first` to the user turns, unless their images keep their places."""
    if interleave_images:
        return conversation
    turns = [
        {**turn, "content": move_images_first(turn["content"])}
        if turn["role"] == "user" and not turn.get("interleave_images")
        else turn
        for turn in conversation.turns
    ]
    return replace(conversation, turns=tuple(turns))


def insert_image_newlines(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Separate the images that start a user turn from its text by exactly one line break.

    Specification §1.5. White space around and between these images is removed, so that a turn has
    the same ids whether its images are placeholders on lines or parts of a message. A turn with an
    image inside or after its text is not changed.
    """
    separated = []
    for turn in turns:
        images, text = split_leading_images(turn)
        if images and IMAGE_TOKEN not in text:
            placeholders = IMAGE_TOKEN * images.count(IMAGE_TOKEN)
            turn = {**turn, "content": text_to_parts(placeholders + (f"\n{text}" if text else ""))}
        separated.append(turn)
    return separated


def split_leading_images(turn: Mapping[str, Any]) -> tuple[str, str]:
    """The images that start a turn with the white space around them, and the other text."""
    text = content_to_text(turn["content"])
    found = _LEADING_IMAGES.match(text)
    return (found[0], text[found.end() :]) if found else ("", text)


def text_to_parts(text: str) -> list[dict[str, Any]]:
    """A text with `<|image|>` as the parts of a message; `content_to_text` is the inverse."""
    parts: list[dict[str, Any]] = []
    for index, segment in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            parts.append({"type": "image"})
        if segment:
            parts.append({"type": "text", "text": segment})
    return parts


def content_to_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """The concatenated parts of a message, with `<|image|>` for images."""
    return "".join(part["text"] if part["type"] == "text" else IMAGE_TOKEN for part in parts)


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` has a surrogate without its pair, as in JSON that was cut inside an emoji.

    Python allows such strings; tokenizers and UTF-8 files do not.
    """
    return re.search("[\ud800-\udfff]", text) is not None


def _read_message(
    message: Any, where: str, images: list[Any], may_be_empty: bool
) -> dict[str, Any]:
    """A message as a turn; its images are appended to `images`."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        # The keys and not the values, which may contain base64.
        found = list(message) if isinstance(message, Mapping) else type(message).__name__
        raise InputError(
            f"{where} must be a dict with 'role' and 'content', not {found!s:.100}.",
            ErrorCode.INVALID_TYPE,
        )
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise InputError(
            f"{where} has the role {role!r}; choose from system, user, assistant.",
            ErrorCode.INVALID_ROLE,
        )
    may_be_empty = may_be_empty and role != "user"
    if content is None and may_be_empty:
        content = ""
    turn = {"role": role, "content": _read_content(content, role, f"{where} ({role})", images)}
    if not may_be_empty and not content_to_text(turn["content"]).strip():
        raise InputError(
            f"{where} ({role}) is empty: it must have text or an image.", ErrorCode.EMPTY_MESSAGE
        )
    if role == "assistant" and message.get("loss") is False:
        turn["loss"] = False
    if role == "user" and message.get("interleave_images"):
        turn["interleave_images"] = True
    return turn


def _merge_roles(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns of messages in any order of roles, as of the clients of OpenAI's API.

    - Empty messages of the system and the assistant are skipped.
    - Neighbors of one role become lines of one turn.
    - A system message after the first turn becomes a line of the user turn next to it.
    - A greeting of the assistant at the start answers an empty user turn.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role != "user" and not content_to_text(content).strip():
            continue
        if role == "system" and any(turn["role"] != "system" for turn in turns):
            role = "user"
        if role == "assistant" and all(turn["role"] == "system" for turn in turns):
            turns.append({"role": "user", "content": [{"type": "text", "text": ""}]})
        if not turns or role != turns[-1]["role"] or role == "system":
            turns.append({**message, "role": role})
            continue
        before = turns[-1]["content"]
        has_texts = all(any(part["type"] == "text" for part in one) for one in (before, content))
        line_break = [{"type": "text", "text": "\n"}] * has_texts
        turns[-1] |= {**message, "role": role, "content": [*before, *line_break, *content]}
    return turns


def _read_content(content: Any, role: str, where: str, images: list[Any]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, (list, tuple)):
        raise InputError(
            f"The content of {where} must be a string or a list of parts, not "
            f"{type(content).__name__}.",
            ErrorCode.INVALID_TYPE,
        )
    first = len(images)
    parts = [
        _read_part(part, f"{where}, part {number}", images) for number, part in enumerate(content)
    ]
    texts = [part for part in parts if part["type"] == "text"]
    num_marked = content_to_text(texts).count(IMAGE_TOKEN)
    if num_marked == len(parts) - len(texts) == len(images) - first:
        parts = texts
    text = content_to_text(parts)
    if role != "user" and IMAGE_TOKEN in text:
        raise InputError(
            f"{where} contains an image, which only user messages can.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    if has_lone_surrogate(text):
        raise InputError(
            f"{where} contains half of a surrogate pair (such as \\ud83d), which is not valid "
            "text: remove it.",
            ErrorCode.INVALID_FORMAT,
        )
    return parts


def _read_part(part: Any, where: str, images: list[Any]) -> dict[str, Any]:
    """A part without its image, which is appended to `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or (kind == "text" and not isinstance(part.get("text"), str)):
        raise InputError(
            f"{where} must be a dict with a 'type', and a string under 'text' if that is its type.",
            ErrorCode.INVALID_TYPE,
        )
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        hint = " Pass the frames of a video as images." if kind == "video" else ""
        raise InputError(
            f"{where}: unknown type {kind!r}; choose from text, image, image_url.{hint}",
            ErrorCode.UNKNOWN_NAME,
        )
    sources = {key: part[key] for key in IMAGE_KEYS if part.get(key) is not None}
    if len(sources) > 1:
        raise InputError(
            f"{where} has more than one image, as {' and '.join(sources)}.", ErrorCode.CONFLICT
        )
    for key, source in sources.items():
        if key == "image_url" and isinstance(source, Mapping):
            source = source.get("url")
        if key != "image" and not isinstance(source, (str, Path)):
            raise InputError(
                f"{where}: {key!r} must be a string, not {type(source).__name__}.",
                ErrorCode.INVALID_TYPE,
            )
        if key == "path":
            source = Path(source)
        elif key == "base64" and not str(source).startswith("data:"):
            source = f"data:;base64,{source}"
        images.append(source)
    return {"type": "image"}
