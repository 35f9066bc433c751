"""VQAv2 and OK-VQA: questions about COCO's images, with ten answers each.

Both are published as a file of questions and a file of annotations, joined by `question_id`.
"""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.coco import coco_directory, coco_image
from owl2.data.datasets.group_by_image import group_by_image, majority_answer
from owl2.data.datasets.prompts import Pair, short_question
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import (
    JsonRecord,
    SkippedRows,
    json_object,
    known_split,
    published_file,
    require_split,
)


def vqav2(
    source: Path,
    *,
    split: str = "train",
    coco: int = 2014,
    max_rounds: int | None = None,
    questions: str | None = None,
    annotations: str | None = None,
) -> Iterator[Sample | SkippedRows]:
    """VQAv2: the majority answer to each question, one conversation per image.

    Reads `v2_OpenEnded_mscoco_train2014_questions.json` and `v2_mscoco_train2014_annotations.json`
    (`split=val`: of val2014).

    Args:
        coco: Year of the image archives, 2014 or 2017.
        max_rounds: See `group_by_image`.

    Raises:
        InputError: A file differs from the published one, the files do not belong together, or one
            has a test split.
    """
    return _convert("vqav2", "v2_", source, split, coco, max_rounds, questions, annotations)


def okvqa(
    source: Path,
    *,
    split: str = "train",
    coco: int = 2014,
    max_rounds: int | None = None,
    questions: str | None = None,
    annotations: str | None = None,
) -> Iterator[Sample | SkippedRows]:
    """OK-VQA 1.1, as `vqav2`. The answers are those under `answer`.

    Reads `OpenEnded_mscoco_train2014_questions.json` and `mscoco_train2014_annotations.json`.
    Version 1.0 has word stems there ("pony tail" is "poni tail").

    Raises:
        InputError: As `vqav2`.
    """
    return _convert("okvqa", "", source, split, coco, max_rounds, questions, annotations)


def _convert(
    name: str,
    prefix: str,
    source: Path,
    split: str,
    coco: int,
    max_rounds: int | None,
    questions: str | None,
    annotations: str | None,
) -> Iterator[Sample | SkippedRows]:
    subtype = known_split(name, split, {"train": "train2014", "val": "val2014"})
    asked = published_file(source, questions, f"{prefix}OpenEnded_mscoco_{subtype}_questions.json")
    answered = published_file(source, annotations, f"{prefix}mscoco_{subtype}_annotations.json")
    pairs = _pairs(asked, answered, subtype, coco_directory(split, coco))
    return group_by_image(pairs, asked, max_rounds)


def _pairs(asked: Path, answered: Path, subtype: str, directory: str) -> Iterator[tuple[str, Pair]]:
    """(image, (question, answer)) of each question."""
    answers = {
        row.integer("question_id"): majority_answer(
            answer.text("answer") for answer in row.rows("answers")
        )
        for row in _rows(answered, "annotations", subtype)
    }
    for row in _rows(asked, "questions", subtype):
        number = row.integer("question_id")
        if number not in answers:
            raise InputError(
                f"{row.where}: {answered.name} has no answer to question {number}; both files must "
                "have the same split",
                ErrorCode.INVALID_FORMAT,
            )
        question = short_question(row.text("question"))
        yield coco_image(row.integer("image_id"), directory), (question, answers.pop(number))
    if answers:
        raise InputError(
            f"{answered} has answers to {len(answers)} questions that are not in {asked.name}; "
            "both files must have the same split",
            ErrorCode.INVALID_FORMAT,
        )


def _rows(path: Path, key: str, subtype: str) -> list[JsonRecord]:
    content = json_object(path)
    require_split(content.value.get("data_subtype"), subtype, str(path))
    return content.rows(key)
