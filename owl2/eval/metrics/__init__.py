"""How answers are scored. A metric has a version, which a change of what it accepts raises.

A metric sees all answers of a task at once, as some are of the whole (CIDEr, F1, pairs); it never
sees images, and needs no model. Those here follow the benchmark's own definition; where the
suites differ from it, the module says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from owl2.eval.samples import Answer

Each = float | None  # 0 … 1, or None where nobody has judged it yet


@dataclass(frozen=True)
class Scores:
    """What a metric makes of some answers.

    Attributes:
        metrics: by name; the task's main one is among them. In the unit in which the benchmark
            tells them.
        each: of every answer, its own score from 0 to 1, in their order.
    """

    metrics: dict[str, float]
    each: list[Each]


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        score: all answers of a task, or of one kind of its questions; never of none.
        main: the name of the figure that stands for the task.
        settings: what else tells two results apart, such as the tokeniser.
    """

    name: str
    version: str
    main: str
    score: Callable[[Sequence[Answer]], Scores]
    settings: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `results.json` holds."""
        return {"name": self.name, "version": self.version, **(self.settings or {})}


def find_metric(path: str) -> Metric:
    """The metric that a recipe names: ``MODULE.NAME`` in this package, such as "exact.MATCH"."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


def mean(each: Sequence[Each]) -> float:
    """Of those that have a score; 0 if none has."""
    known = [score for score in each if score is not None]
    return sum(known) / len(known) if known else 0.0
