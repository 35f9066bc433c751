"""Shared by the datasets of questions: the majority answer, and one conversation per image."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from owl2.data.datasets.prompts import Pair, about_image
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, check_max_rounds

EMPTY_QUESTION = SkippedRows("questions without text or without an answer")


def majority_answer(answers: Iterable[str]) -> str:
    """The most frequent answer, the first one of a tie; "" without an answer.

    Empty answers are ignored.
    """
    votes = Counter(answer for answer in answers if answer)
    return max(votes, key=lambda answer: votes[answer], default="")


def group_by_image(
    questions: Iterable[tuple[str, Pair]], path: Path, max_rounds: int | None = None
) -> Iterator[Sample | SkippedRows]:
    """A conversation per image (Specification §2), in the order of the first question.

    Args:
        questions: (image, (question, answer)). Empty questions and answers are skipped.
        path: The file of the questions.
        max_rounds: Questions per conversation; further questions start another one. None: no limit.
    """
    if max_rounds is not None:
        check_max_rounds(max_rounds)
    images: dict[str, list[Pair]] = {}
    for image, (question, answer) in questions:
        if question and answer:
            images.setdefault(image, []).append((question, answer))
        else:
            yield EMPTY_QUESTION
    for image, pairs in images.items():
        length = max_rounds or len(pairs)
        for start in range(0, len(pairs), length):
            rounds = pairs[start : start + length]
            yield Sample(about_image(image, rounds), f"{path}, image {image}")
