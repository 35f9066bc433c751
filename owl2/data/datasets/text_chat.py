"""ShareGPT and SlimOrca: conversations in text alone.

Both have rows of turns, `{"from": "human" | "gpt" | "system", "value": ...}`. The chat format has
no system prompt (SPEC 1.5), so a system text goes before the first user's text, with a blank line
between. What cannot be a conversation of user and assistant in turns is left out, by reason. Texts
are stripped of space around them.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from owl2.data.sample import Message, Sample
from owl2.json_records import JsonRecord, SkippedRows, json_lines, json_rows, published_file
from owl2.processing.chat_template import IMAGE_TOKEN, has_lone_surrogate

# What a model takes for an image or for an end, wherever it is written (in HTML, <s> strikes out).
MARKS = (IMAGE_TOKEN, "</s>", "<s>", "<unk>")

# ShareGPT's files have all of these; other writers (bing, bard) are neither.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def sharegpt(source: Path, *, file: str | None = None) -> Iterator[Sample | SkippedRows]:
    """ShareGPT: conversations of people with ChatGPT.

    Reads `ShareGPT_V3_unfiltered_cleaned_split.json`. A last turn that nobody answers is cut off,
    and counted; for all else a conversation is taken or left out whole.

    Raises:
        InputError: a file that is not as published.
    """
    path = published_file(source, file, "ShareGPT_V3_unfiltered_cleaned_split.json")
    return _conversations(json_rows(path))


def slimorca(source: Path, *, file: str | None = None) -> Iterator[Sample | SkippedRows]:
    """SlimOrca: instructions from FLAN with GPT-4's answers, mostly after a system text.

    Reads `oo-labeled_correct.gpt4.sharegpt.jsonl`.

    Raises:
        InputError: a file that is not as published.
    """
    path = published_file(source, file, "oo-labeled_correct.gpt4.sharegpt.jsonl")
    return _conversations(json_lines(path))


def _conversations(rows: Iterable[JsonRecord]) -> Iterator[Sample | SkippedRows]:
    for row in rows:
        turns = [(turn.text("from"), turn.text("value")) for turn in row.rows("conversations")]
        if len(turns) > 1 and ROLES.get(turns[-1][0]) == "user":
            yield SkippedRows("last turns without an answer")
            turns.pop()
        reason = _unusable(turns)
        if reason is None:
            yield Sample(_messages(turns), row.where)
        else:
            yield SkippedRows(f"conversations {reason}")


def _unusable(turns: Sequence[tuple[str, str]]) -> str | None:
    """Why turns cannot be a conversation, or None where they can."""
    if not turns:
        return "without a turn"
    if others := sorted({name for name, _ in turns} - ROLES.keys()):
        return f"with turns from {others[0]!r}"
    roles = [ROLES[name] for name, _ in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[0] == "assistant":
        return "that begin with an answer"
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(spoken)):
        return "whose turns do not alternate"
    if spoken[-1] == "user":
        return "without an answer"
    # A system text may be empty; nothing is lost by that.
    if not all(text for role, (_, text) in zip(roles, turns, strict=True) if role != "system"):
        return "with an empty turn"
    if any(has_lone_surrogate(text) for _, text in turns):
        return "with half of a character"
    written = (mark for mark in MARKS if any(mark in text for _, text in turns))
    mark = next(written, None)
    return None if mark is None else f"that write {mark}, a mark of the format"


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = []
    before = ""
    for name, text in turns:
        if ROLES[name] == "system":
            before = f"{text}\n\n" if text else ""
        else:
            messages.append({"role": ROLES[name], "content": before + text})
            before = ""
    return messages
