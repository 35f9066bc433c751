"""Mean opinion scores to training rows of Q-Align and DeQA-Score (Model family §1.4, §3.1, §3.2).

::

    MOS and standard deviations of a dataset ──level words──► rows with a question and an answer
    ──"pdf" or "cdf"──► probabilities of the five levels, instead of one word (DeQA-Score)
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from owl2.constants import LEVELS
from owl2.errors import ErrorCode, InputError

Density = Literal["pdf", "cdf"]

QUESTIONS = (
    "What do you think about the quality of this image?",
    "Can you rate the quality of this picture?",
    "Can you judge the quality of this image?",
    "How would you rate the quality of this image?",
    "How would you judge the quality of this image?",
    "What is your quality rating for this image?",
    "What's your opinion on the quality of this picture?",
    "Rate the quality of this image.",
    "Could you evaluate the quality of this image?",
    "How do you assess the quality of this image?",
)
QUESTION_SEED = 131
SCORES = np.array([5, 4, 3, 2, 1])  # of the levels, the best first
EPSILON = 1e-8
# A label of two levels replaces one of all levels below this deviation, or above this error.
MIN_STD, MAX_DIFFERENCE = 0.2, 0.1


class OpinionScore(NamedTuple):
    """The ratings of an image: mean opinion score and standard deviation, in any range."""

    mos: float
    std: float


@dataclass(frozen=True)
class OpinionRange:
    """The lowest and the highest mean opinion score of a dataset, over all of its splits."""

    low: float
    high: float

    @classmethod
    def of(cls, scores: Iterable[OpinionScore]) -> "OpinionRange":
        """The range of scores. Raises `InputError` if all are equal."""
        values = [score.mos for score in scores]
        if not values or min(values) == max(values):
            raise InputError(
                "Opinion scores need at least two different values.", ErrorCode.EMPTY_DATASET
            )
        return cls(min(values), max(values))

    def normalize(self, score: OpinionScore) -> OpinionScore:
        """The score in the range 1 to 5."""
        width = self.high - self.low
        return OpinionScore(4 * (score.mos - self.low) / width + 1, 4 * score.std / width)

    def level(self, mos: float) -> str:
        """The word for a score: the range has five equal parts."""
        width = (self.high - self.low) / 5
        for index, word in enumerate(reversed(LEVELS), 1):
            low, high = self.low + (index - 1) * width, self.low + index * width
            if low - EPSILON < mos <= high + EPSILON:
                return word
        raise InputError(
            f"The score {mos} is outside of {self.low} to {self.high}.", ErrorCode.INVALID_VALUE
        )


def raw_probabilities(score: OpinionScore, density: Density) -> np.ndarray:
    """The normal distribution of a score (1 to 5) at the five levels, the best first, (5,)."""
    gaussian = NormalDist(score.mos, max(score.std, EPSILON))
    if density == "pdf":
        return np.array([gaussian.pdf(level) for level in SCORES])
    return np.array([gaussian.cdf(level + 0.5) - gaussian.cdf(level - 0.5) for level in SCORES])


def level_probabilities(score: OpinionScore, density: Density) -> np.ndarray:
    """Probabilities of the five levels, the best first, whose mean is a score (1 to 5), (5,).

    Scores that the adjusted distribution does not represent have a label of two levels.
    """
    if score.std < MIN_STD:
        return _two_levels(score.mos)
    raw = raw_probabilities(score, density)
    total, mean = raw.sum(), SCORES @ raw
    scale = (score.mos - 3) / (mean - 3 * total + 1e-9)
    adjusted = np.maximum(scale * raw + (1 - scale * total) / 5, 0)
    if abs(SCORES @ adjusted - score.mos) <= MAX_DIFFERENCE:
        return np.asarray(adjusted)
    return _two_levels(score.mos)


def _two_levels(mos: float) -> np.ndarray:
    for low in range(1, 5):
        if low - EPSILON < mos <= low + 1 + EPSILON:
            share = (low + 1 + EPSILON - mos) / (1 + 2 * EPSILON)
            probabilities = np.zeros(5)
            probabilities[5 - low] = share
            probabilities[4 - low] = (mos - low + EPSILON) / (1 + 2 * EPSILON)
            return probabilities
    raise InputError(f"The score {mos} is outside of 1 to 5.", ErrorCode.INVALID_VALUE)


def training_rows(
    scores: Mapping[str, OpinionScore],
    train: Sequence[str],
    test: Sequence[str],
    density: Density,
    prefix: str = "",
    task: str = "quality",
    kind: str = "image",
) -> list[dict[str, Any]]:
    """The training rows of DeQA-Score, with the questions of the authors.

    Args:
        scores: All images of the dataset, also those in no split, in the order of its file.
        train, test: Names of images. Those for test have no row, but a random question.
        prefix: Prepended to the names as paths.
        task: "quality" or "aesthetics", the word in questions and answers.
        kind: "image" or "video", likewise.
    """
    span = OpinionRange.of(scores.values())
    train_names, test_names = set(train), set(test)
    generator = random.Random(QUESTION_SEED)
    rows = []
    for name, score in scores.items():
        if name not in train_names and name not in test_names:
            continue
        question = generator.choice(QUESTIONS).replace("quality", task)
        if kind == "video":
            question = question.replace("image", kind).replace("picture", kind)
        if name in test_names:
            continue
        normalized = span.normalize(score)
        answer = f"The {task} of the {kind} is {span.level(score.mos)}."
        conversations = [
            {"from": "human", "value": f"{question}\n<|image|>"},
            {"from": "gpt", "value": answer},
        ]
        rows.append(
            {
                "id": f"{name}->{score.mos}",
                "image": f"{prefix}{name}",
                "gt_score": score.mos,
                "gt_score_norm": normalized.mos,
                "level_probs_org": raw_probabilities(normalized, density).tolist(),
                "level_probs": level_probabilities(normalized, density).tolist(),
                "std": score.std,
                "std_norm": normalized.std,
                "conversations": conversations,
            }
        )
    return rows
