"""Metrics of document benchmarks, as in the evaluation code of DocOwl1.5 (Model family §8).

Line breaks of responses and answers are removed, without a space. `ANLS`, `WTQ` and `ENTITY_F1` are
those of the DUE benchmark and ignore case.
"""

import math
import re
import shutil
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, SampleScore, Scores, mean, mean_metric
from owl2.eval.metrics.captions import SETTINGS, tokenize
from owl2.eval.samples import Response

MAX_RELATIVE_CHANGE = 0.05  # of a number, for relaxed accuracy
ANLS_THRESHOLD = 0.5
METEOR_VERSION = "1.5" if shutil.which("java") else None  # of the program in pycocoevalcap
NO_VALUE = "None"  # the response if a document has no value of a category
_EQUAL_NUMBERS = 1e-6


def clean(text: str) -> str:
    """A text in one line, without white space around it."""
    return text.replace("\n", "").strip()


# ------------------------------------------------------------------ ANLS: DocVQA, InfographicsVQA


def edit_distance(one: str, other: str) -> int:
    """The Levenshtein distance."""
    previous = list(range(len(other) + 1))
    for row, own in enumerate(one, start=1):
        current = [row]
        for column, char in enumerate(other, start=1):
            substituted = previous[column - 1] + (own != char)
            current.append(min(previous[column] + 1, current[-1] + 1, substituted))
        previous = current
    return previous[-1]


def anls(response: str, answers: Sequence[str]) -> float:
    """The largest similarity to an answer: 1 - distance / length, or 0 up to a half."""
    own = clean(response).upper()
    best = 0.0
    for answer in answers:
        longest = max(len(own), len(answer))
        similarity = 1 - edit_distance(own, answer.upper()) / longest if longest else 1.0
        best = max(best, similarity)
    return best if best > 1 - ANLS_THRESHOLD else 0.0


# ------------------------------------------------------------------ ChartQA, TabFact


def _expected(one: Response) -> list[str]:
    return [clean(answer).removesuffix(".") for answer in one.sample.expected]


def relaxed_match(response: str, answer: str) -> bool:
    """Numbers, also percentages, may differ by 5 percent; texts must be equal, without case."""
    number, expected = _number(response), _number(answer)
    if number is not None and expected:
        return abs(number - expected) / abs(expected) <= MAX_RELATIVE_CHANGE
    return response.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed(one: Response) -> float:
    return float(any(relaxed_match(clean(one.text), answer) for answer in _expected(one)))


# ------------------------------------------------------------------ WikiTableQuestions


class _Value(NamedTuple):
    """An answer: its text after `normalize_wtq`, and its number or date."""

    kind: str
    content: Any
    text: str


def normalize_wtq(text: str) -> str:
    """Without accents, citations, final remarks in parentheses, and quotation marks around it."""
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(char for char in decomposed if unicodedata.category(char) != "Mn")
    for characters, replacement in (("‘’´`", "'"), ("“”", '"'), ("‐‑‒–—−", "-")):
        text = re.sub(f"[{characters}]", replacement, text)
    before = None
    while text != before:
        before = text
        text = re.sub(r"((?<!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+])*$", "", text.strip())
        text = re.sub(r"(?<!^)( \([^)]*\))*$", "", text.strip())
        text = re.sub(r'^"([^"]*)"$', r"\1", text.strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


def wtq_match(responses: Sequence[str], answers: Sequence[str]) -> bool:
    """Whether two sets of values are equal: the denotation of WikiTableQuestions.

    A value is a number, a date (year-month-day with "xx" for unknown parts) or a text.
    """
    own, expected = _distinct(responses), _distinct(answers)
    return len(own) == len(expected) and all(
        any(_is_same(value, other) for other in own) for value in expected
    )


def _distinct(texts: Sequence[str]) -> list[_Value]:
    values: dict[Any, _Value] = {}
    for text in texts:
        value = _read_value(text)
        values.setdefault((value.kind, value.content), value)
    return list(values.values())


def _read_value(text: str) -> _Value:
    normalized = normalize_wtq(text)
    for convert in (int, float):
        try:
            number = convert(text)
        except (ValueError, OverflowError):
            continue
        if math.isfinite(number):
            is_whole = abs(number - round(number)) < _EQUAL_NUMBERS
            return _Value("number", int(number) if is_whole else number, normalized)
    if date := _read_date(text):
        if date[1] == date[2] == -1:
            return _Value("number", date[0], normalized)
        return _Value("date", date, normalized)
    return _Value("text", normalized, normalized)


def _read_date(text: str) -> tuple[int, int, int] | None:
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    unknown = (("xx", "xxxx"), ("xx",), ("xx",))
    try:
        year, month, day = (
            -1 if part in names else int(part) for part, names in zip(parts, unknown, strict=True)
        )
    except ValueError:
        return None
    is_date = (month == -1 or 1 <= month <= 12) and (day == -1 or 1 <= day <= 31)
    return (year, month, day) if is_date and (year, month, day) != (-1, -1, -1) else None


def _is_same(one: _Value, other: _Value) -> bool:
    if one.text == other.text:
        return True
    if one.kind == other.kind == "number":
        return bool(abs(one.content - other.content) < _EQUAL_NUMBERS)
    return one.kind == other.kind == "date" and one.content == other.content


def _wtq(one: Response) -> float:
    return float(wtq_match([clean(one.text).upper()], [a.upper() for a in one.sample.expected]))


# ------------------------------------------------------------------ DeepForm, Kleister Charity


def _entity_f1(responses: Sequence[Response]) -> Scores:
    """F1 over the pairs of category and value in all documents.

    Metadata of a sample: `document`, `key` (the category) and `annotations` (all of the document).
    """
    documents: dict[str, list[Response]] = {}
    for response in responses:
        documents.setdefault(response.sample.metadata["document"], []).append(response)
    precision: list[SampleScore] = []
    recall: list[SampleScore] = []
    found: dict[int, float] = {}
    for rows in documents.values():
        references = [
            (annotation["key"], _variants(value))
            for annotation in rows[0].sample.metadata["annotations"]
            for value in annotation["values"]
        ]
        predictions = [(row.sample.metadata["key"], clean(row.text), row) for row in rows]
        remaining = list(references)
        for key, text, row in predictions:
            if text == NO_VALUE:
                found[id(row)] = float(all(key != other for other, _ in references))
                continue
            match = next((r for r in remaining if r[0] == key and text.upper() in r[1]), None)
            found[id(row)] = float(match is not None)
            precision.append(found[id(row)])
            if match is not None:
                remaining.remove(match)
        recall += [0.0] * len(remaining) + [1.0] * (len(references) - len(remaining))
    both = mean(precision), mean(recall)
    f1 = 2 * both[0] * both[1] / sum(both) if any(both) else 0.0
    scores: list[SampleScore] = [found[id(row)] for row in responses]
    return Scores({"F1": f1, "precision": both[0], "recall": both[1]}, scores)


def _variants(value: dict[str, Any]) -> set[str]:
    return {text.upper() for text in (value["value"], *value.get("value_variants", ()))}


# ------------------------------------------------------------------ VisualMRC


def _generated_text(responses: Sequence[Response]) -> Scores:
    """CIDEr, BLEU, ROUGE-L and METEOR of pycocoevalcap, times 100; METEOR only with java."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    own = tokenize([clean(response.text) for response in responses])
    candidates = {index: [text] for index, text in enumerate(own)}
    references = {index: tokenize(_expected(one)) for index, one in enumerate(responses)}
    cider, scores = Cider().compute_score(references, candidates)
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, _ = Rouge().compute_score(references, candidates)
    metrics = {"CIDEr": cider, "ROUGE-L": rouge}
    metrics |= {f"BLEU-{number}": value for number, value in enumerate(bleu, start=1)}
    if METEOR_VERSION is not None:
        metrics["METEOR"] = _meteor(references, candidates)
    return Scores(
        {name: 100 * float(value) for name, value in metrics.items()},
        [min(1.0, float(score) / 10) for score in scores],
    )


def _meteor(references: dict[int, list[str]], candidates: dict[int, list[str]]) -> float:
    """METEOR 1.5 of all candidates. pycocoevalcap contains the program and its paraphrases."""
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()
    try:
        score, _ = program.compute_score(references, candidates)
    except (OSError, ValueError) as error:  # the pipe is closed, or the reply is not a number
        raise InputError(
            f"METEOR failed in java: {error!r}. It needs 2 GB of memory.",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    return float(score)


ANLS = mean_metric("anls", lambda one: anls(one.text, one.sample.expected), "ANLS")
RELAXED = mean_metric("relaxed_accuracy", _relaxed)
EXACT = mean_metric("exact_accuracy", lambda one: clean(one.text) in _expected(one))
WTQ = mean_metric("wtq_denotation", _wtq)
ENTITY_F1 = Metric("entity_f1", "1", "F1", _entity_f1)
TEXT = Metric(
    "visual_mrc",
    "1",
    "CIDEr",
    _generated_text,
    {**SETTINGS, "meteor": METEOR_VERSION},
    package="pycocoevalcap",
)
