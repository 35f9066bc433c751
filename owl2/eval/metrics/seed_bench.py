"""SEED-Bench: the right letters, of all questions and of those on images and on videos alone."""

from collections.abc import Sequence

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.metrics.choices import LETTER
from owl2.eval.samples import Answer


def _score(answers: Sequence[Answer]) -> Scores:
    """A question's fact `media` is "image" or "video"."""
    scores = LETTER.score(answers)
    metrics = dict(scores.metrics)
    for media in ("image", "video"):
        of_it = [
            score
            for answer, score in zip(answers, scores.each, strict=True)
            if answer.question.facts["media"] == media
        ]
        if of_it:
            metrics[f"accuracy_{media}"] = mean(of_it)
    return Scores(metrics, scores.each)


SEED_BENCH = Metric("seed_bench", "1", "accuracy", _score)
