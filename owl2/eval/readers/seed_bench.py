"""SEED-Bench: 14,233 questions on images and 3,757 on videos, four options (arXiv:2307.16125)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.metrics.choices import listed
from owl2.eval.readers import Source, each, with_image
from owl2.eval.readers.video import with_video
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_object

OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


def seed_bench(source: Source) -> Iterator[Question | Broken]:
    """Ids are the published ones; kinds are the twelve types of questions.

    Images are in ``SEED-Bench-image/``; videos, or folders with their frames, in
    ``SEED-Bench-video/``. The option `frames`: so many of a video, from the part that the question
    is about.

    Raises:
        MissingData: no SEED-Bench.json.
        InputError: it is not as published.
    """
    published = json_object(source.file("SEED-Bench.json"))
    types = published.value.get("question_type")
    if not isinstance(types, dict):
        raise InputError(f"{published.where}: 'question_type', an object, is missing.")
    kinds = {str(number): name for name, number in types.items()}
    return each(
        published.rows("questions"),
        lambda _, row: _question(
            source, row, kinds.get(str(row.value.get("question_type_id")), "")
        ),
    )


def _question(source: Source, row: JsonRecord, kind: str) -> Question | Broken:
    identity = str(row.value.get("question_id"))
    options = [str(row.value.get(key, "")).strip() for key in OPTIONS]
    answer, media = row.text("answer"), row.text("data_type")
    if answer not in ("A", "B", "C", "D") or not all(options):
        return Broken(identity, "it has no four options, or no answer among them")
    segment = row.value.get("segment") or None  # seconds, of some videos
    if media == "video" and segment is not None and not _is_pair(segment):
        return Broken(identity, f"its segment {segment!r:.60} is not two numbers")
    words = listed(row.text("question"), options)
    messages = _messages(source, row, media, source.ask(words))
    if messages is None:
        return Broken(identity, f"the {media} {row.text('data_id')} is not there")
    facts = {"options": options, "media": media}
    return Question(identity, words, messages, (answer,), kind, facts)


def _messages(
    source: Source, row: JsonRecord, media: str, words: str
) -> list[dict[str, Any]] | None:
    name = row.text("data_id")
    if media == "image":
        image = source.image(f"SEED-Bench-image/{name}")
        return None if image is None else with_image(image, words)
    video = source.image(f"SEED-Bench-video/{name}", f"SEED-Bench-video/{Path(name).stem}")
    segment = row.value.get("segment")
    part = (float(segment[0]), float(segment[1])) if segment else None
    return with_video(video, source.options["frames"], words, part)


def _is_pair(segment: Any) -> bool:
    return (
        isinstance(segment, list)
        and len(segment) == 2
        and all(isinstance(second, (int, float)) for second in segment)
    )
