"""Questions with lettered options: how they are written, and which letter an answer means.

Models answer "B", "(B)", "B. a dog", "The answer is B." or "a dog". What names no option, or more
than one, counts as unparsed and wrong; nothing is guessed. (lmms-eval takes the first character for
SEED-Bench, any capital letter at last resort elsewhere, and for Q-Bench a random option.)
"""

import re
from collections.abc import Sequence

from owl2.data.datasets.prompts import LETTERS
from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Answer

# "A" and "I" are words too: as letters they end what is said, or a sign or a reason follows.
_LETTER = (
    r"[(\[]?(?:([B-HJ-Z])(?![-'’\w])"
    r"|([AI])(?=\s*(?:$|[.,:;!)\]\n/]|(?:and|or|as|because|is|since)\b)))"
)
_ONE_OR_TWO = rf"{_LETTER}(?:[)\]]?\s*(?:/|\bor\b|\band\b)\s*{_LETTER})?"
_RULES = tuple(
    re.compile(rule)
    for rule in (
        rf"\b(?i:answer)(?i:\s+is|\s*:)+\s*(?i:option\s+|choice\s+)?{_ONE_OR_TWO}",
        rf"\b(?i:option|choice)\s+{_ONE_OR_TWO}",
        rf"^{_LETTER}\s+(?:as|because|is|since)\b",
        rf"\b(?i:be|choose|is|it['’]s|pick|say|select)\s+{_LETTER}\W*$",
        r"[(\[]([A-Z])[)\]]",
    )
)


def listed(question: str, options: Sequence[str]) -> str:
    """The question with its options below it: "A. ...", a line each (SPEC 1.5)."""
    return "\n".join([question, *map("{}. {}".format, LETTERS, options)])


def letter_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer means; None where that is not clear.

    The first rule that finds a letter decides: the answer is a letter, with or without brackets
    and a sign; it begins with one, then ":", ".", ")", a new line or that option's own words; it
    says "the answer is B", "option B", "B is ...", "I choose B" or "(B)", and no other letter in
    the same way; it holds the words of one option and of no other.

    Args:
        options: their words, in order; the first is A's.
    """
    letters = LETTERS[: len(options)]
    said = text.replace("*", "").strip()  # "**B**" is Markdown's
    letter = _at_start(said, dict(zip(letters, options, strict=True)))
    if letter is not None:
        return letter
    for rule in _RULES:
        named = {letter for found in rule.findall(said) for letter in found} & set(letters)
        if named:
            return named.pop() if len(named) == 1 else None
    places = _named(said, options)
    return letters[places[0]] if len(places) == 1 else None


def _at_start(said: str, options: dict[str, str]) -> str | None:
    found = re.match(
        r"\W*([A-Za-z])(?:\W*$|[)\]]?\s*[.:)\]](?!\s*(?:or|and)\s+[(\[]?[A-Z]\b)|\s*\n)", said
    )
    if found is None:
        found = re.match(r"([A-Z])[\s,-]+(.+)", said, re.DOTALL)
        if found is None or _plain(found[2]) != _plain(options.get(found[1], "")):
            return None
    letter = found[1].upper()
    return letter if letter in options else None


def _named(said: str, options: Sequence[str]) -> list[int]:
    """Places of the options whose words are said: those of "dog house" are not those of "dog"."""
    rest = _plain(said)
    found = []
    for place in sorted(range(len(options)), key=lambda place: -len(_plain(options[place]))):
        words = _plain(options[place])
        if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", rest):
            found.append(place)
            if sum(_plain(option) == words for option in options) == 1:
                rest = re.sub(rf"(?<!\w){re.escape(words)}(?!\w)", "|", rest)
    return found


def _plain(words: str) -> str:
    return " ".join(words.lower().split()).rstrip(".").rstrip()


def right_letters(answers: Sequence[Answer]) -> tuple[list[float], list[bool]]:
    """Of each answer whether it is right, 0 or 1, and whether a letter was found in it.

    A question's first expected answer is the letter, its fact `options` the options' words.
    """
    letters = [letter_of(answer.text, answer.question.facts["options"]) for answer in answers]
    right = [
        float(letter == answer.question.expected[0])
        for letter, answer in zip(letters, answers, strict=True)
    ]
    return right, [letter is not None for letter in letters]


def _score(answers: Sequence[Answer]) -> Scores:
    right, parsed = right_letters(answers)
    unparsed = 1 - mean([float(found) for found in parsed])
    return Scores({"accuracy": mean(right), "unparsed": unparsed}, list(right))


LETTER = Metric("letter", "1", "accuracy", _score)
