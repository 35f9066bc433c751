"""MMMU: options and open answers by the rules of its script (arXiv:2311.16502)."""

import re
from collections.abc import Iterator, Sequence
from random import Random

from owl2.data.datasets.prompts import LETTERS
from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response

_TAIL_STARTS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
MIN_WORDS = 6  # of a response that is searched for the text of an option


def parse_letter_mmmu(text: str, options: Sequence[str]) -> str | None:
    """The last option of the first form that the response contains; None if there is none.

    The forms are "(A)", " A ", and in a response of six or more words the text of the option.
    """
    for char in ",.!?;:'":
        text = text.strip(char)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    forms = [(text, [f"({letter})" for letter in letters])]
    forms += [(text, [f" {letter} " for letter in letters])]
    if len(text.split()) >= MIN_WORDS:
        forms += [(text.lower(), [option.lower() for option in options])]
    for haystack, needles in forms:
        places = [haystack.rfind(needle) for needle in needles]
        if max(places) >= 0:
            return letters[places.index(max(places))]
    return None


def is_open_match(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer is within the conclusion of a response, or one of its numbers."""
    expected = [value for answer in answers for value in _normalize(answer)]
    names = [name for name in expected if isinstance(name, str)]
    return any(
        any(name in value for name in names) if isinstance(value, str) else value in expected
        for value in _predictions(text)
    )


def _predictions(text: str) -> Iterator[str | float]:
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    tails = []  # of each line, the shortest text after a word such as "is"
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for start in (*_TAIL_STARTS, *("=" * (number == len(lines)))):
            if start in line:
                tail = line.split(start)[-1].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in (*":,.!?;'",):
            tails.append(shortest)
    for tail in tails or [text]:
        for value in (tail, *(found for rule in _NUMBERS for found in re.findall(rule, tail))):
            yield from _normalize(value)


def _normalize(text: str) -> list[str | float]:
    """A number with two decimals, or the text in lower case; one character has an added space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mmmu(responses: Sequence[Response]) -> Scores:
    """Accuracy; `options` of the metadata are those of a multiple choice.

    A random option counts where none is named, as in the script; the seed is the id of the sample.
    """
    correct, unparsed = [], []
    for response in responses:
        sample, options = response.sample, response.sample.metadata.get("options")
        if options:
            letter = parse_letter_mmmu(response.text, options)
            unparsed.append(float(letter is None))
            letter = letter or Random(sample.id).choice(LETTERS[: len(options)])
            correct.append(float(letter in sample.expected))
        else:
            correct.append(float(is_open_match(response.text, sample.expected)))
    return Scores({"accuracy": mean(correct), "unparsed": mean(unparsed)}, [*correct])


MMMU = Metric("mmmu", "1", "accuracy", _mmmu)
