"""What all data sets of questions share: the agreed answer, and one conversation a picture."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from owl2.data.datasets.prompts import Pair, about_picture
from owl2.data.datasets.published import LeftOut, check_most
from owl2.data.sample import Sample

NOTHING_SAID = LeftOut("questions without words or without an answer")


def most_agreed(answers: Iterable[str]) -> str:
    """The answer that most annotators gave; of equals the one given first; "" if there is none.

    Blank answers do not count.
    """
    votes = Counter(answer for answer in answers if answer)
    return max(votes, key=lambda answer: votes[answer], default="")  # max takes the first of equals


def joined(
    asked: Iterable[tuple[str, Pair]], path: Path, most: int | None = None
) -> Iterator[Sample | LeftOut]:
    """(picture, (question, answer)) → a conversation a picture (SPEC §2), in order of appearance.

    `path`: the file that it is from. `most`: of the questions in a conversation, others go on to
    further ones about the picture. A blank question or answer is left out.
    """
    if most is not None:
        check_most(most)
    pictures: dict[str, list[Pair]] = {}
    for picture, (question, answer) in asked:
        if question and answer:
            pictures.setdefault(picture, []).append((question, answer))
        else:
            yield NOTHING_SAID
    for picture, pairs in pictures.items():
        for start in range(0, len(pairs), most or len(pairs)):
            part = pairs[start : start + most] if most else pairs
            yield Sample(about_picture(picture, part), f"{path}, picture {picture}")
