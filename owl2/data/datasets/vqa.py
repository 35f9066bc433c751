"""VQAv2 and OK-VQA: questions about COCO's images, with ten people's answers each.

Both come as a file of questions and a file of annotations, group_by_image by `question_id`.
"""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.coco import coco_folder, coco_image
from owl2.data.datasets.group_by_image import group_by_image, majority_answer
from owl2.data.datasets.prompts import Pair, short_question
from owl2.data.sample import Sample
from owl2.errors import InputError
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
    most: int | None = None,
    questions: str | None = None,
    annotations: str | None = None,
) -> Iterator[Sample | SkippedRows]:
    """VQAv2: the most agreed answer; the questions about an image are one conversation.

    Reads `v2_OpenEnded_mscoco_train2014_questions.json` and `v2_mscoco_train2014_annotations.json`
    (`split=val`: of val2014). `coco`: the year of the image archives at hand, 2014 or 2017.
    `most`: of the questions in a conversation; default: all about the image.

    Raises:
        InputError: a file that is not as published; files that do not belong together; a test file.
    """
    folder = known_split("vqav2", split, {"train": "train2014", "val": "val2014"})
    asked = published_file(source, questions, f"v2_OpenEnded_mscoco_{folder}_questions.json")
    answered = published_file(source, annotations, f"v2_mscoco_{folder}_annotations.json")
    return group_by_image(_pairs(asked, answered, folder, coco_folder(split, coco)), asked, most)


def okvqa(
    source: Path,
    *,
    split: str = "train",
    coco: int = 2014,
    most: int | None = None,
    questions: str | None = None,
    annotations: str | None = None,
) -> Iterator[Sample | SkippedRows]:
    """OK-VQA, version 1.1: as VQAv2. An annotator's answer is taken under `answer`.

    Reads `OpenEnded_mscoco_train2014_questions.json` and `mscoco_train2014_annotations.json`.
    Version 1.0 holds word stems there ("pony tail" is "poni tail").

    Raises:
        InputError: as `vqav2`.
    """
    folder = known_split("okvqa", split, {"train": "train2014", "val": "val2014"})
    asked = published_file(source, questions, f"OpenEnded_mscoco_{folder}_questions.json")
    answered = published_file(source, annotations, f"mscoco_{folder}_annotations.json")
    return group_by_image(_pairs(asked, answered, folder, coco_folder(split, coco)), asked, most)


def _pairs(asked: Path, answered: Path, subtype: str, folder: str) -> Iterator[tuple[str, Pair]]:
    answers = _answers(answered, subtype)
    for row in _list(asked, "questions", subtype):
        number = row.integer("question_id")
        if number not in answers:
            raise InputError(
                f"{row.where}: {answered.name} has no answer to question {number}; "
                "the two files must be of the same split."
            )
        question = short_question(row.text("question"))
        image = coco_image(row.integer("image_id"), folder)
        yield image, (question, answers.pop(number))
    if answers:
        raise InputError(
            f"{answered} answers {len(answers)} questions that {asked.name} does not ask; "
            "the two files must be of the same split."
        )


def _answers(path: Path, subtype: str) -> dict[int, str]:
    return {
        row.integer("question_id"): majority_answer(
            given.text("answer") for given in row.rows("answers")
        )
        for row in _list(path, "annotations", subtype)
    }


def _list(path: Path, key: str, subtype: str) -> list[JsonRecord]:
    content = json_object(path)
    require_split(content.value.get("data_subtype"), subtype, str(path))
    return content.rows(key)
