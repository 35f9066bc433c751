"""Messages to validated turns: roles, parts, images and videos.

::

    messages ──parse_messages──► ParsedMessages (turns, images, videos) ──chat_template.render──►
    text with `<|image|>` and `<|video|>` ──expand_media──► a video is the images of its frames
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError
from owl2.processing.message_parts import (
    IMAGE_TOKEN,
    MEDIA,
    TOKENS,
    VIDEO_TOKEN,
    content_to_text,
    has_lone_surrogate,
    move_images_first,
    text_to_parts,
)
from owl2.processing.video import sample_frames

# Of a part {"type": "image"} and of a part {"type": "video"}.
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
VIDEO_KEYS = ("video", "url", "path", "base64", "video_url")

Message = Mapping[str, Any]


# Sources of images and videos, by the type of their parts.
Sources = dict[str, list[Any]]


@dataclass(frozen=True)
class Video:
    """A video of a message.

    Attributes:
        source: As for `sample_frames`.
        num_frames: Instead of the processor's; also `PER_SECOND`.
    """

    source: Any
    num_frames: int | str | None = None

    def frames(self, num_frames: int) -> list[Any]:
        """The frames; `num_frames` of them if the video has no own number. See `sample_frames`."""
        count = num_frames if self.num_frames is None else self.num_frames
        return sample_frames(self.source, count)


@dataclass(frozen=True)
class ParsedMessages:
    """Validated messages.

    Attributes:
        turns: Messages whose parts are `{"type": "text", "text": str}`, `{"type": "image"}` and
            `{"type": "video"}`. An answer with `"loss": False` has no labels. The images and
            videos of a turn with `"interleave_images": True` keep their places, see
            `move_images_first`.
        images: Sources of the images for `load_image`, in order of appearance, not yet opened. A
            part `{"type": "image"}` without a source has none.
        videos: The videos of the parts `{"type": "video"}` with a source, in order.
    """

    turns: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]
    videos: tuple[Video, ...] = ()

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
        return replace(self, turns=tuple(turns))


def parse_messages(
    messages: Sequence[Message] | ParsedMessages, merge_roles: bool = False
) -> ParsedMessages:
    """Validate messages in the format of transformers; `ParsedMessages` are returned unchanged.

    Roles alternate, starting with `user` after optional `system` messages. A content is a string
    or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image" | "url" |
    "path" | "base64": ...}` or OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, and
    the same for `{"type": "video", ...}`, with an optional number `num_frames`, or `{"type":
    "video_url", ...}`. `<|image|>` and `<|video|>` in a text mark an image and a video as well. If
    the texts of a message mark as many of them as the message has parts with a source, these are
    the marked ones.

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
    sources: Sources = {"image": [], "video": []}
    turns = [
        _read_message(message, f"messages[{index}]", sources, merge_roles)
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
    return ParsedMessages(tuple(turns), tuple(sources["image"]), tuple(sources["video"]))


def validate_prompt(
    messages: Sequence[Message] | ParsedMessages, is_continued: bool = False
) -> ParsedMessages:
    """Parse messages that must end with a user message. An image without text is one.

    Args:
        is_continued: They must end with the beginning of an answer instead.

    Raises:
        InputError: As `parse_messages`; also if the last message has the other role.
    """
    parsed = parse_messages(messages, merge_roles=True)
    if is_continued:  # `render` checks the last message
        return parsed
    if not parsed.is_open:
        raise InputError(
            "The last message is an answer; the conversation must end with a user message.",
            ErrorCode.INVALID_ROLE,
        )
    return parsed


def user_message(
    text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), num_frames: int | None = None
) -> dict[str, Any]:
    """The user message of a question, its images and its videos, as `Engine.chat` takes it.

    Images and videos replace the `<|image|>` and `<|video|>` placeholders of the text and keep
    these places. Without placeholders the images precede the text, and the videos are between.

    Args:
        num_frames: Of each video, instead of the processor's.

    Raises:
        InputError: The numbers of placeholders and images or videos differ.
    """
    sources = {"image": images, "video": videos}
    marked = MEDIA.findall(text)
    for kind, found in sources.items():
        if marked and marked.count(kind) != len(found):
            raise InputError(
                f"The question has {marked.count(kind)} {TOKENS[kind]} placeholder(s) for "
                f"{len(found)} {kind}(s): each placeholder takes one {kind}.",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
    if not marked:
        text = IMAGE_TOKEN * len(images) + VIDEO_TOKEN * len(videos) + text
    unused = {kind: iter(found) for kind, found in sources.items()}
    count = {} if num_frames is None else {"num_frames": num_frames}
    parts = [
        part
        if (kind := part["type"]) == "text"
        else {**part, kind: next(unused[kind]), **(count if kind == "video" else {})}
        for part in text_to_parts(text)
    ]
    places = {"interleave_images": True} if marked else {}
    return {"role": "user", "content": parts, **places}


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


def _read_message(message: Any, where: str, sources: Sources, may_be_empty: bool) -> dict[str, Any]:
    """A message as a turn; its images and videos are appended to `sources`."""
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
    turn = {"role": role, "content": _read_content(content, role, f"{where} ({role})", sources)}
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


def _read_content(content: Any, role: str, where: str, sources: Sources) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, (list, tuple)):
        raise InputError(
            f"The content of {where} must be a string or a list of parts, not "
            f"{type(content).__name__}.",
            ErrorCode.INVALID_TYPE,
        )
    first = {kind: len(found) for kind, found in sources.items()}
    parts = [
        _read_part(part, f"{where}, part {number}", sources) for number, part in enumerate(content)
    ]
    texts = [part for part in parts if part["type"] == "text"]
    marked = MEDIA.findall(content_to_text(texts))
    others = [part["type"] for part in parts if part["type"] != "text"]
    given = [kind for kind, found in sources.items() for _ in found[first[kind] :]]
    if sorted(marked) == sorted(others) == given:
        parts = texts
    text = content_to_text(parts)
    if role != "user" and (found := MEDIA.search(text)):
        raise InputError(
            f"{where} contains {found[0]}, which only user messages can.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    if has_lone_surrogate(text):
        raise InputError(
            f"{where} contains half of a surrogate pair (such as \\ud83d), which is not valid "
            "text: remove it.",
            ErrorCode.INVALID_FORMAT,
        )
    return parts


def _read_part(part: Any, where: str, sources: Sources) -> dict[str, Any]:
    """A part without its image or video, which is appended to `sources`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or (kind == "text" and not isinstance(part.get("text"), str)):
        raise InputError(
            f"{where} must be a dict with a 'type', and a string under 'text' if that is its type.",
            ErrorCode.INVALID_TYPE,
        )
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in (types := ("text", "image", "image_url", "video", "video_url")):
        raise InputError(
            f"{where}: unknown type {kind!r}; choose from {', '.join(types)}.",
            ErrorCode.UNKNOWN_NAME,
        )
    kind = kind.removesuffix("_url")
    keys = IMAGE_KEYS if kind == "image" else VIDEO_KEYS
    given = {key: part[key] for key in keys if part.get(key) is not None}
    if len(given) > 1:
        raise InputError(
            f"{where} has more than one {kind}, as {' and '.join(given)}.", ErrorCode.CONFLICT
        )
    for key, source in given.items():
        if key == f"{kind}_url" and isinstance(source, Mapping):
            source = source.get("url")
        if key != kind and not isinstance(source, (str, Path)):
            raise InputError(
                f"{where}: {key!r} must be a string, not {type(source).__name__}.",
                ErrorCode.INVALID_TYPE,
            )
        if key == "path":
            source = Path(source)
        elif key == "base64" and not str(source).startswith("data:"):
            source = f"data:;base64,{source}"
        sources[kind].append(source if kind == "image" else Video(source, part.get("num_frames")))
    return {"type": kind}
