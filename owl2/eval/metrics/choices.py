"""Multiple-choice questions: the format of the options, and the letter that a response means.

Models respond "B", "(B)", "B. a dog", "The answer is B." or "a dog". A response that names no
option or several counts as unparsed and wrong; nothing is guessed. (lmms-eval uses the first
character for SEED-Bench, any capital letter as a last resort elsewhere, and a random option for
Q-Bench.)
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from owl2.data.datasets.prompts import LETTERS
from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response

# "A" and "I" are also words: as letters they end the response, or punctuation or a reason follows.
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


def with_options(question: str, options: Sequence[str]) -> str:
    """The question and a line "A. ..." for each option (Specification §1.5)."""
    return "\n".join([question, *map("{}. {}".format, LETTERS, options)])


def parse_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a response means; None if it is ambiguous.

    The first rule that finds a letter decides:

    1. The response is a letter, with or without brackets and punctuation.
    2. It starts with a letter, followed by ":", ".", ")", a new line or the text of that option.
    3. It contains "the answer is B", "option B", "B is ...", "I choose B" or "(B)", and no other
       letter in the same form.
    4. It contains the text of one option and of no other.

    Args:
        options: Their texts, in order; the letter of the first is A.
    """
    letters = LETTERS[: len(options)]
    text = text.replace("*", "").strip()  # "**B**" is Markdown
    letter = _leading_letter(text, dict(zip(letters, options, strict=True)))
    if letter is not None:
        return letter
    for rule in _RULES:
        named = {letter for found in rule.findall(text) for letter in found} & set(letters)
        if named:
            return named.pop() if len(named) == 1 else None
    mentioned = _mentioned_options(text, options)
    return letters[mentioned[0]] if len(mentioned) == 1 else None


def _leading_letter(text: str, options: dict[str, str]) -> str | None:
    found = re.match(
        r"\W*([A-Za-z])(?:\W*$|[)\]]?\s*[.:)\]](?!\s*(?:or|and)\s+[(\[]?[A-Z]\b)|\s*\n)", text
    )
    if found is None:
        found = re.match(r"([A-Z])[\s,-]+(.+)", text, re.DOTALL)
        if found is None or _normalize(found[2]) != _normalize(options.get(found[1], "")):
            return None
    letter = found[1].upper()
    return letter if letter in options else None


def _mentioned_options(text: str, options: Sequence[str]) -> list[int]:
    """Indices of the options in the text; "dog house" does not mention the option "dog"."""
    rest, normalized = _normalize(text), [_normalize(option) for option in options]
    found = []
    for index in sorted(range(len(options)), key=lambda index: -len(normalized[index])):
        option = normalized[index]
        pattern = rf"(?<!\w){re.escape(option)}(?!\w)"
        if option and re.search(pattern, rest):
            found.append(index)
            if normalized.count(option) == 1:
                rest = re.sub(pattern, "|", rest)
    return found


def _normalize(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


# ------------------------------------------------------------------ metrics


def _letters(responses: Sequence[Response]) -> Scores:
    """The expected answer of a sample is a letter; `options` of its metadata are the options."""
    letters = [
        parse_letter(response.text, response.sample.metadata["options"]) for response in responses
    ]
    correct = [
        float(letter == response.sample.expected[0])
        for letter, response in zip(letters, responses, strict=True)
    ]
    unparsed = mean([float(letter is None) for letter in letters])
    return Scores({"accuracy": mean(correct), "unparsed": unparsed}, [*correct])


def _circular(responses: Sequence[Response]) -> Scores:
    """The circular evaluation of MMBench: a question counts if all its rounds are correct.

    The options are rotated by one position in each round, so that a preference for a letter gains
    nothing (arXiv:2307.06281). The authors let a language model parse responses without a letter;
    here those count as wrong, and `unparsed` is their share. `question` of the metadata is the same
    for all rounds of a question.
    """
    scores = _letters(responses)
    rounds: dict[str, list[float]] = defaultdict(list)
    for response, score in zip(responses, scores.per_sample, strict=True):
        rounds[response.sample.metadata["question"]].append(score or 0.0)
    metrics = {
        "accuracy": mean([min(values) for values in rounds.values()]),
        "accuracy_of_rounds": scores.metrics["accuracy"],
        "unparsed": scores.metrics["unparsed"],
    }
    return Scores(metrics, scores.per_sample)


def _seed_bench(responses: Sequence[Response]) -> Scores:
    """Accuracy for all samples, and by `media` of the metadata: "image" or "video"."""
    scores = _letters(responses)
    metrics = dict(scores.metrics)
    for media in ("image", "video"):
        selected = [
            score
            for response, score in zip(responses, scores.per_sample, strict=True)
            if response.sample.metadata["media"] == media
        ]
        if selected:
            metrics[f"accuracy_{media}"] = mean(selected)
    return Scores(metrics, scores.per_sample)


LETTER = Metric("letter", "1", "accuracy", _letters)
CIRCULAR = Metric("mmbench_circular", "1", "accuracy", _circular)
SEED_BENCH = Metric("seed_bench", "1", "accuracy", _seed_bench)
