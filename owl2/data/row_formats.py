"""The formats of rows: which keys they have, and their messages with placeholders in the texts."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from owl2.data.media_keys import unused_keys
from owl2.data.sample import Message
from owl2.errors import ErrorCode, InputError, shorten

# LLaVA's files write the first, mPLUG-Owl2's files the second.
IMAGE_PLACEHOLDER = re.compile(r"<image>|<\|image\|>")
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


def find_format(row: Mapping[str, Any]) -> Format:
    """The format of a row. Raises `InputError` if it has none or several."""
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
            is_image = "content" in last and not IMAGE_PLACEHOLDER.sub("", last["content"]).strip()
            if role == last.get("role") == "user" and is_image:
                last["content"] += f"\n{content}"
                continue
        messages.append(make_message(turn, role, content))
    return messages


def make_message(turn: Mapping[str, Any], role: Any, content: Any) -> Message:
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
    return [make_message({}, roles[i], pair[i]) for pair in rounds for i in range(2)]


def _read_caption(row: Mapping[str, Any], key: str) -> list[Message]:
    if key == "text" and {"Human", "AI"} <= set(_OWL_TURN.findall(row[key])):
        return _read_owl(row[key])
    for question in ("question", "query", "prompt", "instruction"):
        if row.get(question):
            raise InputError(
                f"a row has {key!r} and {question!r}, but no known format has both",
                ErrorCode.INVALID_FORMAT,
            )
    media = [{"type": "video" if row.get("video") else "image"}]
    return [make_message({}, "user", media), make_message({}, "assistant", row[key].strip())]


def _read_owl(text: str) -> list[Message]:
    """The turns of an mPLUG-Owl row: "Human: <image>\\nHuman: question\\nAI: answer\\n..."."""
    system, *fields = _OWL_TURN.split(text)
    messages: list[Message] = []
    if system.strip() not in ("", OWL_SYSTEM):
        messages.append(make_message({}, "system", system.strip()))
    for name, content in zip(fields[::2], fields[1::2], strict=True):
        role = "user" if name == "Human" else "assistant"
        if role == "user" and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{content.strip()}"
        else:
            messages.append(make_message({}, role, content.strip()))
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
