"""A-OKVQA: questions that need knowledge, with four options and ten free-form answers."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from owl2.data.datasets.coco import coco_image
from owl2.data.datasets.group_by_image import EMPTY_QUESTION, majority_answer
from owl2.data.datasets.prompts import LETTERS, about_image, choice_question, short_question
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import (
    JsonRecord,
    SkippedRows,
    json_rows,
    known_split,
    published_file,
    require_split,
)
from owl2.registry import look_up

FORMS = ("direct", "choice", "reordered")


def aokvqa(
    source: Path,
    *,
    split: str = "train",
    forms: str = "direct,choice,reordered",
    file: str | None = None,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """A-OKVQA, each question in up to three `forms`, each in its own conversation.

    - `direct`: the majority of the free-form answers.
    - `choice`: the options, and the letter of the correct one.
    - `reordered`: the same in another order, which depends on `seed` and the question.

    The forms are not joined, because each reveals the answers of the others. 3 × 17,056 samples are
    the 50 K of the paper.

    Reads `aokvqa_v1p0_train.json` (`split=val`: `aokvqa_v1p0_val.json`). The images are those of
    COCO 2017.

    Raises:
        InputError: The file differs from the published one or has another split; an unknown form.
    """
    selected = [
        look_up("form of A-OKVQA's questions", form, {name: name for name in FORMS})
        for form in str(forms).split(",")
    ]
    splits = {name: f"aokvqa_v1p0_{name}.json" for name in ("train", "val")}
    path = published_file(source, file, known_split("aokvqa", split, splits))
    for row in json_rows(path):
        require_split(row.text("split"), split, row.where)
        yield from _question(row, f"{split}2017", selected, seed)


def _question(
    row: JsonRecord, directory: str, forms: list[str], seed: int
) -> Iterator[Sample | SkippedRows]:
    question, options = row.text("question"), row.texts("choices")
    correct = row.integer("correct_choice_idx")
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        raise InputError(
            f"{row.where}: 'choices' must have at least two options, all with text",
            ErrorCode.INVALID_FORMAT,
        )
    if not 0 <= correct < len(options):
        raise InputError(
            f"{row.where}: 'correct_choice_idx' is {correct} with {len(options)} options",
            ErrorCode.INVALID_FORMAT,
        )
    image = coco_image(row.integer("image_id"), directory)
    for form in forms:
        if form == "direct":
            text, answer = short_question(question), majority_answer(row.texts("direct_answers"))
        else:
            order = list(range(len(options)))
            if form == "reordered":
                order = different_order(len(options), Random(f"{seed}/{row.text('question_id')}"))
            text = choice_question(question, [options[i] for i in order])
            answer = LETTERS[order.index(correct)]
        if question and answer:
            yield Sample(about_image(image, [(text, answer)]), f"{row.where}, {form}")
        else:
            yield EMPTY_QUESTION


def different_order(length: int, rng: Random) -> list[int]:
    """A random permutation of range(length) other than the identity, if there is one."""
    order = list(range(length))
    while length > 1 and order == list(range(length)):
        rng.shuffle(order)
    return order
