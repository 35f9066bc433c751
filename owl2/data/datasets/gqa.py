"""GQA: questions generated from Visual Genome's scene graphs."""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.group_by_image import group_by_image
from owl2.data.datasets.prompts import short_question
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, json_entries, known_split, published_file


def gqa(
    source: Path, *, split: str = "train", max_rounds: int | None = None, file: str | None = None
) -> Iterator[Sample | SkippedRows]:
    """GQA's balanced questions with their short answers, one conversation per image.

    Reads `train_balanced_questions.json` (`split=val`: `val_balanced_questions.json`). The images
    are in `images/`. `max_rounds`: see `group_by_image`.

    Raises:
        InputError: The file differs from the published one; an unknown split.
    """
    names = {name: f"{name}_balanced_questions.json" for name in ("train", "val")}
    path = published_file(source, file, known_split("gqa", split, names))
    questions = (
        (
            f"images/{row.text('imageId')}.jpg",
            (short_question(row.text("question")), row.text("answer")),
        )
        for _, row in json_entries(path)
    )
    return group_by_image(questions, path, max_rounds)
