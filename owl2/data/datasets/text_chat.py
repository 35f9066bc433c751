"""ShareGPT and SlimOrca: text-only conversations.

Both have rows of turns, `{"from": "human" | "gpt" | "system", "value": ...}`. The chat format has
no system prompt (Specification §1.5), so a system text is put before the first user text, separated
by a blank line. Rows that do not alternate between user and assistant are skipped, by reason. Texts
are stripped.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from owl2.data.sample import Message, Sample
from owl2.json_records import JsonRecord, SkippedRows, json_lines, json_rows, published_file
from owl2.processing.chat_template import IMAGE_TOKEN, has_lone_surrogate

# The tokenizer reads these as special tokens anywhere in a text (in HTML, <s> is strikethrough).
SPECIAL_TOKENS = (IMAGE_TOKEN, "</s>", "<s>", "<unk>")

# ShareGPT's files have all of these, and others (bing, bard), which are skipped.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def sharegpt(source: Path, *, file: str | None = None) -> Iterator[Sample | SkippedRows]:
    """ShareGPT: conversations with ChatGPT.

    Reads `ShareGPT_V3_unfiltered_cleaned_split.json`. A last turn without an answer is removed and
    counted; otherwise a conversation is used completely or skipped.

    Raises:
        InputError: The file differs from the published one.
    """
    path = published_file(source, file, "ShareGPT_V3_unfiltered_cleaned_split.json")
    return _conversations(json_rows(path))


def slimorca(source: Path, *, file: str | None = None) -> Iterator[Sample | SkippedRows]:
    """SlimOrca: instructions from FLAN with answers of GPT-4, mostly with a system text.

    Reads `oo-labeled_correct.gpt4.sharegpt.jsonl`.

    Raises:
        InputError: The file differs from the published one.
    """
    path = published_file(source, file, "oo-labeled_correct.gpt4.sharegpt.jsonl")
    return _conversations(json_lines(path))


def _conversations(rows: Iterable[JsonRecord]) -> Iterator[Sample | SkippedRows]:
    for row in rows:
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
    if others := sorted({name for name, _ in turns} - ROLES.keys()):
        return f"with turns from {others[0]!r}"
    roles = [ROLES[name] for name, _ in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[0] == "assistant":
        return "that start with an answer"
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        return "whose turns do not alternate"
    if spoken[-1] == "user":
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
