"""Questions with short answers: VQAv2, OK-VQA, GQA, VizWiz and TextVQA.

All but GQA have the answers of ten people each.
"""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.coco import coco_image
from owl2.errors import InputError
from owl2.eval.readers import Source, each, with_image
from owl2.eval.samples import Broken, Question
from owl2.json_records import (
    JsonRecord,
    json_entries,
    json_object,
    json_rows,
    require_split,
)

COCO = "val2014"


def vqav2(source: Source) -> Iterator[Question | Broken]:
    """214,354 questions about COCO's val2014; the kind is yes/no, number or other.

    Raises:
        MissingData: the file of questions or that of annotations is not there.
        InputError: one is not as published, or the two do not belong together.
    """
    asked = source.file(f"v2_OpenEnded_mscoco_{COCO}_questions.json")
    answered = source.file(f"v2_mscoco_{COCO}_annotations.json")
    return _about_coco(source, asked, answered, "answer_type")


def okvqa(source: Source) -> Iterator[Question | Broken]:
    """5,046 questions about COCO's val2014; the kind is the field of knowledge.

    The annotations of version 1.1: version 1.0 has stems of words ("poni tail").

    Raises:
        MissingData, InputError: as `vqav2`.
    """
    asked = source.file(f"OpenEnded_mscoco_{COCO}_questions.json")
    answered = source.file(f"mscoco_{COCO}_annotations.json")
    return _about_coco(source, asked, answered, "question_type")


def gqa(source: Source) -> Iterator[Question | Broken]:
    """12,578 balanced questions of testdev, one right answer each; the kind is binary or open.

    GQA calls a question open whose structure is a query, and all others binary.

    Raises:
        MissingData: no `testdev_balanced_questions.json`.
        InputError: it is not as published.
    """
    rows = dict(json_entries(source.file("testdev_balanced_questions.json")))
    numbers = list(rows)

    def make(number: int, row: JsonRecord) -> Question | Broken:
        structure = as_text(row.value.get("types"), "structural")
        kind = {"": "", "query": "open"}.get(structure, "binary")
        name = f"{row.text('imageId')}.jpg"
        answers = [row.text("answer")]
        return _question(source, row, numbers[number - 1], answers, kind, f"images/{name}", name)

    return each(rows.values(), make)


def vizwiz(source: Source) -> Iterator[Question | Broken]:
    """4,319 questions of blind people about photographs of theirs (val); ids are the images.

    The kind is yes/no, number, other or unanswerable.

    Raises:
        MissingData: no `val.json`.
        InputError: it is not as published.
    """

    def make(_: int, row: JsonRecord) -> Question | Broken:
        name = row.text("image")
        answers = [given.text("answer") for given in row.rows("answers")]
        kind = as_text(row.value, "answer_type")
        return _question(source, row, name, answers, kind, f"val/{name}", f"images/{name}", name)

    path = source.file("val.json", "Annotations/val.json", "annotations/val.json")
    return each(json_rows(path), make)


def textvqa(source: Source) -> Iterator[Question | Broken]:
    """5,000 questions about what is written in images (val); OCR's tokens are not shown.

    Raises:
        MissingData: no `TextVQA_0.5.1_val.json`.
        InputError: it is not as published.
    """

    def make(_: int, row: JsonRecord) -> Question | Broken:
        name = f"{row.text('image_id')}.jpg"
        number = str(row.integer("question_id"))
        folders = ("train_images", "train_val_images/train_images", "images")
        places = (*(f"{folder}/{name}" for folder in folders), name)
        return _question(source, row, number, row.texts("answers"), "", *places)

    return each(json_object(source.file("TextVQA_0.5.1_val.json")).rows("data"), make)


def as_text(value: object, key: str) -> str:
    """The text under a key that not all copies have; "" if there is none."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _about_coco(
    source: Source, asked: Path, answered: Path, kind: str
) -> Iterator[Question | Broken]:
    """The two files joined; `kind`: the annotations' key for it."""
    annotations = json_object(answered)
    require_split(annotations.value.get("data_subtype"), COCO, str(answered))
    given = {
        number: row
        for row in annotations.rows("annotations")
        if isinstance(number := row.value.get("question_id"), int)
    }
    names = annotations.value.get("question_types")  # OK-VQA's: "one" and so on → a name
    questions = json_object(asked)
    require_split(questions.value.get("data_subtype"), COCO, str(asked))

    def make(_: int, row: JsonRecord) -> Question | Broken:
        number = row.integer("question_id")
        if number not in given:
            raise InputError(
                f"{row.where}: {answered.name} has no answer to question {number}; "
                "the two files must be of the same split."
            )
        code = as_text(given[number].value, kind)
        answers = [person.text("answer") for person in given[number].rows("answers")]
        path = coco_image(row.integer("image_id"), COCO)
        places = (path, f"images/{path}", path.removeprefix(f"{COCO}/"))
        return _question(source, row, str(number), answers, as_text(names, code) or code, *places)

    return each(questions.rows("questions"), make)


def _question(
    source: Source, row: JsonRecord, number: str, answers: list[str], kind: str, *images: str
) -> Question | Broken:
    text = row.text("question")
    expected = tuple(answers)
    if not text or not any(expected):
        return Broken(number, "there is no question" if not text else "nobody's answer is there")
    image = source.image(*images)
    if image is None:
        return Broken(number, f"the image {images[0]} is not there")
    return Question(number, text, with_image(image, source.ask(text)), expected, kind)
