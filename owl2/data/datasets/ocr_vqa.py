"""OCR-VQA: questions about book covers."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from owl2.data.datasets.group_by_image import EMPTY_QUESTION
from owl2.data.datasets.prompts import about_image, short_question
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import JsonRecord, SkippedRows, json_entries, known_split, published_file

SPLITS = {1: "train", 2: "val", 3: "test"}


def ocr_vqa(
    source: Path, *, split: str = "train", file: str | None = None
) -> Iterator[Sample | SkippedRows]:
    """OCR-VQA, one conversation per cover.

    Reads `dataset.json`, which contains all three splits. The images are in `images/`, named by the
    key with the suffix of their URL, as the authors' download script saves them. Covers without a
    URL are skipped.

    Raises:
        InputError: The file differs from the published one; an unknown split.
    """
    wanted = known_split("ocr_vqa", split, {"train": "train", "val": "val"})
    path = published_file(source, file, "dataset.json")
    for key, row in json_entries(path):
        number = row.integer("split")
        if number not in SPLITS:
            raise InputError(
                f"{row.where}: 'split' is {number}, not 1, 2 or 3", ErrorCode.INVALID_FORMAT
            )
        if SPLITS[number] == wanted:
            yield from _cover(key, row)


def _cover(key: str, row: JsonRecord) -> Iterator[Sample | SkippedRows]:
    questions, answers = row.texts("questions"), row.texts("answers")
    if len(questions) != len(answers):
        raise InputError(
            f"{row.where}: {len(questions)} questions, but {len(answers)} answers",
            ErrorCode.INVALID_FORMAT,
        )
    url = row.text("imageURL") if row.value.get("imageURL") else ""
    if not url:
        yield SkippedRows("covers without an image URL")
        return
    pairs = []
    for question, answer in zip(questions, answers, strict=True):
        if question and answer:
            pairs.append((short_question(question), answer))
        else:
            yield EMPTY_QUESTION
    if pairs:
        suffix = PurePosixPath(urlsplit(url).path).suffix
        yield Sample(about_image(f"images/{key}{suffix}", pairs), row.where)
