"""Whether an answer is one of those expected, word for word."""

from collections.abc import Sequence

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Answer


def normalise(answer: str) -> str:
    """Lower case, without white space around it and without one final period."""
    return answer.strip().lower().removesuffix(".").rstrip()


def _score(answers: Sequence[Answer]) -> Scores:
    each = [
        float(normalise(answer.text) in map(normalise, answer.question.expected))
        for answer in answers
    ]
    return Scores({"accuracy": mean(each)}, list(each))


MATCH = Metric("exact_match", "1", "accuracy", _score)
