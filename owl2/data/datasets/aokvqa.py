"""A-OKVQA: questions that need knowledge, with four options and ten people's own answers."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from owl2.data.datasets.coco import coco_image
from owl2.data.datasets.group_by_image import NOTHING_SAID, majority_answer
from owl2.data.datasets.prompts import LETTERS, about_image, choice_question, short_question
from owl2.data.sample import Sample
from owl2.errors import InputError
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
    """A-OKVQA: each question in up to three `forms`, each a conversation of its own.

    `direct`: the most agreed of the people's answers; `choice`: the options, and the right one's
    letter; `reordered`: the same in another order, drawn by `seed` and the question. They are not
    joined, as each gives the others' answer away; 3 × 17,056 are the paper's 50 K.

    Reads `aokvqa_v1p0_train.json` (`split=val`: `aokvqa_v1p0_val.json`). The images are COCO's of
    2017.

    Raises:
        InputError: a file that is not as published, or of another split; another form.
    """
    wanted = [
        look_up("form of A-OKVQA's questions", form, {f: f for f in FORMS})
        for form in str(forms).split(",")
    ]
    splits = {name: f"aokvqa_v1p0_{name}.json" for name in ("train", "val")}
    path = published_file(source, file, known_split("aokvqa", split, splits))
    for row in json_rows(path):
        require_split(row.text("split"), split, row.where)
        yield from _question(row, f"{split}2017", wanted, seed)


def _question(
    row: JsonRecord, folder: str, forms: list[str], seed: int
) -> Iterator[Sample | SkippedRows]:
    question, options, right = _published(row)
    image = coco_image(row.integer("image_id"), folder)
    for form in forms:
        if form == "direct":
            words, answer = short_question(question), majority_answer(row.texts("direct_answers"))
        else:
            order = list(range(len(options)))
            if form == "reordered":
                order = another_order(len(options), Random(f"{seed}/{row.text('question_id')}"))
            words = choice_question(question, [options[place] for place in order])
            answer = LETTERS[order.index(right)]
        if question and answer:
            yield Sample(about_image(image, [(words, answer)]), f"{row.where}, {form}")
        else:
            yield NOTHING_SAID


def another_order(length: int, random: Random) -> list[int]:
    """The numbers below `length` in any order but their own (for which it takes two)."""
    order = list(range(length))
    while length > 1 and order == list(range(length)):
        random.shuffle(order)
    return order


def _published(row: JsonRecord) -> tuple[str, list[str], int]:
    options, right = row.texts("choices"), row.integer("correct_choice_idx")
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        raise InputError(f"{row.where}: 'choices' must be options with words, two at least.")
    if not 0 <= right < len(options):
        raise InputError(
            f"{row.where}: 'correct_choice_idx' is {right}, and there are {len(options)} options."
        )
    return row.text("question"), options, right
