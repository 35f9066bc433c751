"""GQA: questions made of Visual Genome's scene graphs."""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.group_by_image import group_by_image
from owl2.data.datasets.prompts import short_question
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, json_entries, known_split, published_file


def gqa(
    source: Path, *, split: str = "train", most: int | None = None, file: str | None = None
) -> Iterator[Sample | SkippedRows]:
    """GQA's balanced questions with their short answers; those about an image are group_by_image.

    Reads `train_balanced_questions.json` (`split=val`: `val_balanced_questions.json`). Images are
    in `images/`. `most`: of the questions in a conversation; default: all about the image.

    Raises:
        InputError: a file that is not as published; another split.
    """
    names = {name: f"{name}_balanced_questions.json" for name in ("train", "val")}
    path = published_file(source, file, known_split("gqa", split, names))
    asked = (
        (
            f"images/{row.text('imageId')}.jpg",
            (short_question(row.text("question")), row.text("answer")),
        )
        for _, row in json_entries(path)
    )
    return group_by_image(asked, path, most)
