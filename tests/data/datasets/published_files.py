"""Writes small files in the published formats, and summarizes converted samples."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from owl2.data.sample import Sample, SkippedRows, validated
from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import parse_messages

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."


def put(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def put_lines(folder: Path, name: str, rows: Iterable[Any]) -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def split_skipped(items: Iterable[Sample | SkippedRows]) -> tuple[list[Sample], dict[str, int]]:
    """The valid samples, and the skipped rows by reason."""
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    for item in items:
        if isinstance(item, SkippedRows):
            skipped[item.reason] += item.count
        else:
            samples.append(validated(item))
    return samples, dict(skipped)


def summarize(sample: Sample) -> tuple[str | None, list[tuple[str, str]]]:
    """(path of the image, rounds as text) of a sample; images are `<|image|>` in the text."""
    conversation = parse_messages(sample.messages)
    texts = [content_to_text(turn["content"]) for turn in conversation.turns]
    (image,) = conversation.images or (None,)
    rounds = list(zip(texts[::2], texts[1::2], strict=True))
    return None if image is None else image.as_posix(), rounds


def summarize_all(
    items: Iterable[Sample | SkippedRows],
) -> list[tuple[str | None, list[tuple[str, str]]]]:
    samples, skipped = split_skipped(items)
    assert skipped == {}
    return [summarize(sample) for sample in samples]
