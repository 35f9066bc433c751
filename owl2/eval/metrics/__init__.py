"""Metrics. A metric has a version, which increases when its scores change.

A metric gets all responses of a task, as some are not means over samples (CIDEr, F1, pairs). It
needs no images and no model. The metrics follow the definitions of the benchmarks; differences to
lmms-eval and lm-eval are in the docstrings of the modules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from owl2.eval.samples import Response

SampleScore = float | None  # 0 to 1; None where a judge has not scored it yet


@dataclass(frozen=True)
class Scores:
    """The scores of some responses.

    Attributes:
        metrics: Values by name, in the unit of the benchmark.
        per_sample: The score of each response, in their order.
    """

    metrics: dict[str, float]
    per_sample: list[SampleScore]


@dataclass(frozen=True)
class Metric:
    """A scoring function with its version.

    Attributes:
        main: The name of the value that represents the task.
        score: Scores the responses of a task or of one category: one or more.
        settings: Other values on which the scores depend, such as the tokenizer.
        package: An optional package that `score` imports.
    """

    name: str
    version: str
    main: str
    score: Callable[[Sequence[Response]], Scores]
    settings: Mapping[str, Any] | None = None
    package: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry in `results.json`."""
        return {"name": self.name, "version": self.version, **(self.settings or {})}


def find_metric(path: str) -> Metric:
    """The metric with a name of the form ``MODULE.NAME`` in this package: "vqa.VQA"."""
    metric: Metric = resolve_name(f"{__name__}.{path}")
    return metric


def mean_metric(
    name: str, score_one: Callable[[Response], float], main: str = "accuracy"
) -> Metric:
    """The metric whose only value, called `main`, is the mean of the scores of the responses."""

    def score(responses: Sequence[Response]) -> Scores:
        scores = [float(score_one(response)) for response in responses]
        return Scores({main: mean(scores)}, [*scores])

    return Metric(name, "1", main, score)


def mean(scores: Sequence[SampleScore]) -> float:
    """The mean of the scores that are not None; 0 without any."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else 0.0
