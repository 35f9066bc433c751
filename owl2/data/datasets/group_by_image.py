"""What all data sets of questions share: the agreed answer, and one conversation an image."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from owl2.data.datasets.prompts import Pair, about_image
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, check_max_rounds

NOTHING_SAID = SkippedRows("questions without words or without an answer")


def majority_answer(answers: Iterable[str]) -> str:
    """The answer that most annotators gave; of equals the one given first; "" if there is none.

    Blank answers do not count.
    """
    votes = Counter(answer for answer in answers if answer)
    return max(votes, key=lambda answer: votes[answer], default="")  # max takes the first of equals


def group_by_image(
    asked: Iterable[tuple[str, Pair]], path: Path, most: int | None = None
) -> Iterator[Sample | SkippedRows]:
    """(image, (question, answer)) → a conversation an image (SPEC §2), in order of appearance.

    `path`: the file that it is from. `most`: of the questions in a conversation, others go on to
    further ones about the image. A blank question or answer is left out.
    """
    if most is not None:
        check_max_rounds(most)
    images: dict[str, list[Pair]] = {}
    for image, (question, answer) in asked:
        if question and answer:
            images.setdefault(image, []).append((question, answer))
        else:
            yield NOTHING_SAID
    for image, pairs in images.items():
        for start in range(0, len(pairs), most or len(pairs)):
            part = pairs[start : start + most] if most else pairs
            yield Sample(about_image(image, part), f"{path}, image {image}")
