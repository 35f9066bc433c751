"""When an answer is right. A scorer has a version, which a change of what it accepts raises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scorer:
    """`is_right(answer, expected)`: whether the answer is one of those expected.

    Results carry `name` and `version`, so that two of them can be told to be comparable.
    """

    name: str
    version: str
    is_right: Callable[[str, Sequence[str]], bool]

    def to_dict(self) -> dict[str, str]:
        """What `results.json` holds."""
        return {"name": self.name, "version": self.version}


def normalise(answer: str) -> str:
    """Lower case, without white space around it and without one final period."""
    return answer.strip().lower().removesuffix(".").rstrip()


def _equals_one(answer: str, expected: Sequence[str]) -> bool:
    return normalise(answer) in {normalise(right) for right in expected}


EXACT_MATCH = Scorer("exact_match", "1", _equals_one)
