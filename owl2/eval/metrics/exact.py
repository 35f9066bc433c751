"""Exact match with one of the expected answers, after normalization."""

from collections.abc import Sequence

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response


def normalize(answer: str) -> str:
    """Lower case, without surrounding white space and without one final period."""
    return answer.strip().lower().removesuffix(".").rstrip()


def _score(responses: Sequence[Response]) -> Scores:
    scores = [
        float(normalize(response.text) in map(normalize, response.sample.expected))
        for response in responses
    ]
    return Scores({"accuracy": mean(scores)}, [*scores])


MATCH = Metric("exact_match", "1", "accuracy", _score)
