"""Published conversations: LLaVA-Instruct about images; ShareGPT and SlimOrca, text only.

All have rows of turns, `{"from": "human" | "gpt" | "system", "value": ...}`. The chat format has no
system prompt (Specification §1.5), so a system text is put before the first user text, separated by
a blank line. Text-only rows that do not alternate between user and assistant are skipped, by
reason; their texts are stripped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from owl2.data.row_formats import ROLES
from owl2.data.row_parsers import image_reader, parse_row
from owl2.data.sample import Message, Sample, SkippedRows
from owl2.errors import ErrorCode, InputError
from owl2.json_records import json_lines, json_rows
from owl2.processing.message_parts import IMAGE_TOKEN, has_lone_surrogate

# The tokenizer reads these as special tokens anywhere in a text (in HTML, <s> is strikethrough).
SPECIAL_TOKENS = (IMAGE_TOKEN, "</s>", "<s>", "<unk>")


def llava_instruct(path: Path) -> Iterator[Sample | SkippedRows]:
    """LLaVA-Instruct, with the text as the authors' training code reads it (see `row_parsers`).

    The images of LLaVA-Instruct-150K are file names in COCO's `train2017`. Those of LLaVA-1.5's
    mixture (`llava_v1_5_mix665k.json`) have a directory, such as `gqa/images/1.jpg`. Conversations
    with an empty turn are skipped.
    """
    for row in json_rows(path):
        try:
            yield parse_row(row.value, row.where, _llava_image)
        except InputError as error:
            if error.code is not ErrorCode.EMPTY_MESSAGE:
                raise
            yield SkippedRows("conversations with an empty turn")


def _llava_image(name: Any) -> Message:
    is_bare = isinstance(name, str) and "/" not in name
    return image_reader(Path("train2017" if is_bare else ""))(name)


def text_conversations(path: Path) -> Iterator[Sample | SkippedRows]:
    """ShareGPT's `.json`: conversations with ChatGPT. SlimOrca's `.jsonl`: instructions from FLAN
    with answers of GPT-4, mostly with a system text.

    A last turn without an answer is removed and counted; otherwise a conversation is used
    completely or skipped.
    """
    for row in json_lines(path) if path.suffix == ".jsonl" else json_rows(path):
        turns = [(turn.text("from"), turn.text("value")) for turn in row.rows("conversations")]
        if len(turns) > 1 and ROLES.get(turns[-1][0]) == "user":
            yield SkippedRows("last turns without an answer")
            turns.pop()
        reason = _reason_to_skip(turns)
        if reason is None:
            yield Sample(_messages(turns), row.where)
        else:
            yield SkippedRows(f"conversations {reason}")


def _reason_to_skip(turns: Sequence[tuple[str, str]]) -> str | None:
    """Why the turns are not a valid conversation; None for valid ones."""
    if not turns:
        return "without a turn"
    if unknown := sorted({name for name, _ in turns} - ROLES.keys()):
        return f"with turns from {unknown[0]!r}"
    roles = [ROLES[name] for name, _ in turns]
    others = roles[1:] if roles[0] == "system" else roles
    if not others or others[0] == "assistant":
        return "that start with an answer"
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(others)):
        return "whose turns do not alternate"
    if others[-1] == "user":
        return "without an answer"
    # A system text may be empty.
    if not all(text for role, (_, text) in zip(roles, turns, strict=True) if role != "system"):
        return "with an empty turn"
    if any(has_lone_surrogate(text) for _, text in turns):
        return "with a lone surrogate"
    for token in SPECIAL_TOKENS:
        if any(token in text for _, text in turns):
            return f"that contain the special token {token}"
    return None


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = []
    system = ""
    for name, text in turns:
        if ROLES[name] == "system":
            system = f"{text}\n\n" if text else ""
        else:
            messages.append({"role": ROLES[name], "content": system + text})
            system = ""
    return messages
