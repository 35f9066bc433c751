"""Questions with short answers: VQAv2, OK-VQA, GQA, VizWiz and TextVQA.

All but GQA have the answers of ten annotators.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from owl2.data.datasets.coco import coco_image
from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import EvalData, invalid_value, read_each
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.json_records import JsonRecord, json_entries, json_object, json_rows, require_split

COCO = "val2014"


def vqav2(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """214,354 questions about val2014 of COCO; categories are yes/no, number and other.

    Raises:
        InputError: A file is missing, has another format, or the two are of different splits.
    """
    questions = data.file(f"v2_OpenEnded_mscoco_{COCO}_questions.json")
    annotations = data.file(f"v2_mscoco_{COCO}_annotations.json")
    return _about_coco(data, questions, annotations, "answer_type")


def okvqa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """5,046 questions about val2014 of COCO; categories are fields of knowledge.

    It reads the annotations of version 1.1: those of 1.0 contain stems ("poni tail").

    Raises:
        InputError: As `vqav2`.
    """
    questions = data.file(f"OpenEnded_mscoco_{COCO}_questions.json")
    annotations = data.file(f"mscoco_{COCO}_annotations.json")
    return _about_coco(data, questions, annotations, "question_type")


def gqa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """12,578 balanced questions of testdev with one answer; categories are binary and open.

    GQA calls a question open if its structure is a query, and binary otherwise.

    Raises:
        InputError: `testdev_balanced_questions.json` is missing or has another format.
    """
    entries = dict(json_entries(data.file("testdev_balanced_questions.json")))
    identifiers = list(entries)

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        structure = text_or_empty(row.value.get("types"), "structural")
        category = {"": "", "query": "open"}.get(structure, "binary")
        name = f"{row.text('imageId')}.jpg"
        images = (f"images/{name}", name)
        return _sample(data, row, identifier, [row.text("answer")], category, images)

    return read_each(entries.values(), lambda number, _: identifiers[number - 1], make)


def vizwiz(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """4,319 questions of visually impaired people about their photos (val); ids are the images.

    Categories are yes/no, number, other and unanswerable.

    Raises:
        InputError: `val.json` is missing or has another format.
    """

    def make(name: str, row: JsonRecord) -> EvalSample:
        answers = [given.text("answer") for given in row.rows("answers")]
        images = (f"val/{name}", f"images/{name}", name)
        return _sample(data, row, name, answers, text_or_empty(row.value, "answer_type"), images)

    path = data.file("val.json", "Annotations/val.json", "annotations/val.json")
    return read_each(json_rows(path), lambda _, row: row.text("image"), make)


def textvqa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """5,000 questions about text in images (val); the tokens of the OCR system are not used.

    Raises:
        InputError: `TextVQA_0.5.1_val.json` is missing or has another format.
    """

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        name = f"{row.text('image_id')}.jpg"
        folders = ("train_images", "train_val_images/train_images", "images")
        images = [*(f"{folder}/{name}" for folder in folders), name]
        return _sample(data, row, identifier, row.texts("answers"), "", images)

    rows = json_object(data.file("TextVQA_0.5.1_val.json")).rows("data")
    return read_each(rows, lambda _, row: str(row.integer("question_id")), make)


def text_or_empty(value: object, key: str) -> str:
    """The text under a key that some published copies lack; "" without it."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _about_coco(
    data: EvalData, questions: Path, annotations: Path, category_key: str
) -> Iterator[EvalSample | InvalidEvalSample]:
    """The join of the two files."""
    annotated = json_object(annotations)
    require_split(annotated.value.get("data_subtype"), COCO, str(annotations))
    answers_of = {
        number: row
        for row in annotated.rows("annotations")
        if isinstance(number := row.value.get("question_id"), int)
    }
    names = annotated.value.get("question_types")  # OK-VQA: a code such as "one" → a name
    asked = json_object(questions)
    require_split(asked.value.get("data_subtype"), COCO, str(questions))

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        annotation = answers_of.get(int(identifier))
        if annotation is None:
            raise InputError(
                f"{row.where}: {annotations.name} has no answer to question {identifier}. The two "
                "files must be of the same split.",
                ErrorCode.INVALID_FORMAT,
            )
        code = text_or_empty(annotation.value, category_key)
        answers = [given.text("answer") for given in annotation.rows("answers")]
        path = coco_image(row.integer("image_id"), COCO)
        images = (path, f"images/{path}", path.removeprefix(f"{COCO}/"))
        category = text_or_empty(names, code) or code
        return _sample(data, row, identifier, answers, category, images)

    rows = asked.rows("questions")
    return read_each(rows, lambda _, row: str(row.integer("question_id")), make)


def _sample(
    data: EvalData,
    row: JsonRecord,
    identifier: str,
    answers: Sequence[str],
    category: str,
    images: Sequence[str],
) -> EvalSample:
    question = row.text("question")
    if not question or not any(answers):
        raise invalid_value("The answers are empty." if question else "The question is empty.")
    return data.sample(identifier, question, [data.image(*images)], answers, category)
