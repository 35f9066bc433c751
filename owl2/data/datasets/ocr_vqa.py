"""OCR-VQA: questions about the covers of books."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from owl2.data.datasets.group_by_image import NOTHING_SAID
from owl2.data.datasets.prompts import about_image, short_question
from owl2.data.sample import Sample
from owl2.errors import InputError
from owl2.json_records import JsonRecord, SkippedRows, json_entries, known_split, published_file

SPLITS = {1: "train", 2: "val", 3: "test"}


def ocr_vqa(
    source: Path, *, split: str = "train", file: str | None = None
) -> Iterator[Sample | SkippedRows]:
    """OCR-VQA: all questions about a cover in one conversation.

    Reads `dataset.json`, which has all three splits. Images are in `images/`, with the key as
    name and the ending of their URL, as the authors' download script saves them; covers without a
    URL are left out.

    Raises:
        InputError: a file that is not as published; another split.
    """
    wanted = known_split("ocr_vqa", split, {"train": "train", "val": "val"})
    path = published_file(source, file, "dataset.json")
    for key, row in json_entries(path):
        number = row.integer("split")
        if number not in SPLITS:
            raise InputError(f"{row.where}: 'split' is {number}; it is 1, 2 or 3.")
        if SPLITS[number] == wanted:
            yield from _cover(key, row)


def _cover(key: str, row: JsonRecord) -> Iterator[Sample | SkippedRows]:
    questions, answers = row.texts("questions"), row.texts("answers")
    if len(questions) != len(answers):
        raise InputError(f"{row.where}: {len(questions)} questions with {len(answers)} answers.")
    url = row.text("imageURL") if row.value.get("imageURL") else ""
    if not url:
        yield SkippedRows("covers without an image's URL")
        return
    asked = list(zip(questions, answers, strict=True))
    pairs = [
        (short_question(question), answer) for question, answer in asked if question and answer
    ]
    for _ in range(len(asked) - len(pairs)):
        yield NOTHING_SAID
    if pairs:
        ending = PurePosixPath(urlsplit(url).path).suffix
        yield Sample(about_image(f"images/{key}{ending}", pairs), row.where)
