"""Questions about images: VQAv2, OK-VQA, GQA, OCR-VQA and A-OKVQA.

Each question contains the request for a short answer. The questions about an image become one
conversation (Specification §2), or several with at most `max_rounds` questions each.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from random import Random
from urllib.parse import urlsplit

from pydantic import PositiveInt

from owl2.data.datasets.coco import Year, coco_directory, coco_image
from owl2.data.datasets.prompts import (
    LETTERS,
    Pair,
    choice_question,
    conversations,
    short_question,
)
from owl2.data.sample import Sample, SkippedRows
from owl2.errors import ErrorCode, InputError
from owl2.json_records import JsonRecord, json_entries, json_object, json_rows, require_split
from owl2.registry import look_up

EMPTY_QUESTION = SkippedRows("questions without text or without an answer")
OCR_VQA_SPLITS = {1: "train", 2: "val", 3: "test"}
FORMS = ("direct", "choice", "reordered")


def majority_answer(answers: Iterable[str]) -> str:
    """The most frequent answer, the first one of a tie; "" without an answer.

    Empty answers are ignored.
    """
    votes = Counter(answer for answer in answers if answer)
    return max(votes, key=lambda answer: votes[answer], default="")


def group_by_image(
    questions: Iterable[tuple[str, Pair]], path: Path, max_rounds: int | None = None
) -> Iterator[Sample | SkippedRows]:
    """Conversations about each image, in the order of the first question.

    Args:
        questions: (image, (question, answer)). Empty questions and answers are skipped.
        path: The file of the questions.
        max_rounds: Questions per conversation; None: no limit.
    """
    images: dict[str, list[Pair]] = {}
    for image, (question, answer) in questions:
        if question and answer:
            images.setdefault(image, []).append((question, answer))
        else:
            yield EMPTY_QUESTION
    for image, pairs in images.items():
        yield from conversations(image, pairs, f"{path}, image {image}", max_rounds)


# ------------------------------------------------------------------ VQAv2 and OK-VQA


def visual_questions(
    questions: Path,
    annotations: Path,
    split: str,
    *,
    coco: Year = 2014,
    max_rounds: PositiveInt | None = None,
) -> Iterator[Sample | SkippedRows]:
    """VQAv2 or OK-VQA 1.1: the majority of ten answers to each question about a COCO image.

    Both are published as a file of questions and a file of annotations, joined by `question_id`.
    Version 1.0 of OK-VQA has word stems as answers ("pony tail" is "poni tail").

    Args:
        coco: Year of the image archives.
    """
    directory = coco_directory(split, coco)
    pairs = _visual_pairs(questions, annotations, f"{split}2014", directory)
    return group_by_image(pairs, questions, max_rounds)


def _visual_pairs(
    questions: Path, annotations: Path, subtype: str, directory: str
) -> Iterator[tuple[str, Pair]]:
    """(image, (question, answer)) of each question."""
    answers = {
        row.integer("question_id"): majority_answer(
            answer.text("answer") for answer in row.rows("answers")
        )
        for row in _rows_of_split(annotations, "annotations", subtype)
    }
    for row in _rows_of_split(questions, "questions", subtype):
        number = row.integer("question_id")
        if number not in answers:
            raise InputError(
                f"{row.where}: {annotations.name} has no answer to question {number}; both files "
                "must have the same split",
                ErrorCode.INVALID_FORMAT,
            )
        question = short_question(row.text("question"))
        yield coco_image(row.integer("image_id"), directory), (question, answers.pop(number))
    if answers:
        raise InputError(
            f"{annotations} has answers to {len(answers)} questions that are not in "
            f"{questions.name}; both files must have the same split",
            ErrorCode.INVALID_FORMAT,
        )


def _rows_of_split(path: Path, key: str, subtype: str) -> list[JsonRecord]:
    content = json_object(path)
    require_split(content.value.get("data_subtype"), subtype, str(path))
    return content.rows(key)


# ------------------------------------------------------------------ GQA and OCR-VQA


def gqa(
    path: Path, split: str, *, max_rounds: PositiveInt | None = None
) -> Iterator[Sample | SkippedRows]:
    """GQA's balanced questions, generated from Visual Genome's scene graphs; short answers.

    The images are in `images/`.
    """
    questions = (
        (
            f"images/{row.text('imageId')}.jpg",
            (short_question(row.text("question")), row.text("answer")),
        )
        for _, row in json_entries(path)
    )
    return group_by_image(questions, path, max_rounds)


def ocr_vqa(path: Path, split: str) -> Iterator[Sample | SkippedRows]:
    """OCR-VQA: questions about book covers, one conversation per cover.

    The file contains all three splits. The images are in `images/`, named by the key with the
    suffix of their URL, as the authors' download script saves them. Covers without a URL are
    skipped.
    """
    for key, row in json_entries(path):
        number = row.integer("split")
        if number not in OCR_VQA_SPLITS:
            raise InputError(
                f"{row.where}: 'split' is {number}, not 1, 2 or 3", ErrorCode.INVALID_FORMAT
            )
        if OCR_VQA_SPLITS[number] != split:
            continue
        questions, answers = row.texts("questions"), row.texts("answers")
        if len(questions) != len(answers):
            raise InputError(
                f"{row.where}: {len(questions)} questions, but {len(answers)} answers",
                ErrorCode.INVALID_FORMAT,
            )
        if not row.value.get("imageURL"):
            yield SkippedRows("covers without an image URL")
            continue
        suffix = PurePosixPath(urlsplit(row.text("imageURL")).path).suffix
        pairs = [pair for pair in zip(questions, answers, strict=True) if all(pair)]
        if len(pairs) < len(questions):
            yield SkippedRows(EMPTY_QUESTION.reason, len(questions) - len(pairs))
        short = [(short_question(question), answer) for question, answer in pairs]
        yield from conversations(f"images/{key}{suffix}", short, row.where)


# ------------------------------------------------------------------ A-OKVQA


def aokvqa(
    path: Path, split: str, *, forms: str = ",".join(FORMS), seed: int = 0
) -> Iterator[Sample | SkippedRows]:
    """A-OKVQA: questions that need knowledge, with four options and ten free-form answers.

    Each question has up to three `forms`, each in its own conversation:

    - `direct`: the majority of the free-form answers.
    - `choice`: the options, and the letter of the correct one.
    - `reordered`: the same in another order, which depends on `seed` and the question.

    The forms are not joined, because each reveals the answers of the others. 3 × 17,056 samples are
    the 50 K of the paper. The images are those of COCO 2017.
    """
    selected = forms.split(",")
    for form in selected:
        look_up("form of A-OKVQA's questions", form, dict.fromkeys(FORMS))
    for row in json_rows(path):
        require_split(row.text("split"), split, row.where)
        options, correct = row.texts("choices"), row.integer("correct_choice_idx")
        if not (2 <= len(options) <= len(LETTERS) and all(options) and 0 <= correct < len(options)):
            raise InputError(
                f"{row.where}: 'choices' must have at least two options, all with text, and "
                f"'correct_choice_idx' ({correct}) must be the index of one",
                ErrorCode.INVALID_FORMAT,
            )
        image = coco_image(row.integer("image_id"), f"{split}2017")
        for form in selected:
            question, answer = _question_in_form(row, form, options, correct, seed)
            if row.text("question") and answer:
                yield from conversations(image, [(question, answer)], f"{row.where}, {form}")
            else:
                yield EMPTY_QUESTION


def _question_in_form(
    row: JsonRecord, form: str, options: list[str], correct: int, seed: int
) -> Pair:
    question = row.text("question")
    if form == "direct":
        return short_question(question), majority_answer(row.texts("direct_answers"))
    order = list(range(len(options)))
    if form == "reordered":
        order = different_order(len(options), Random(f"{seed}/{row.text('question_id')}"))
    return choice_question(question, [options[i] for i in order]), LETTERS[order.index(correct)]


def different_order(length: int, rng: Random) -> list[int]:
    """A random permutation of range(length) other than the identity, if there is one."""
    order = list(range(length))
    while length > 1 and order == list(range(length)):
        rng.shuffle(order)
    return order
