"""The labels of scoring models: opinions, and the positions of the level words.

::

    Sample, Features ──ScoreLabels──► Features with level_probs (1, L), gt_scores (1,), stds (1,),
                                      level_positions (1,): of the level word in the labels (1, S)

L = 5 levels, the best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from owl2.constants import IGNORE_INDEX, LEVELS
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.processing.processor import Owl2Processor


def level_positions(labels: torch.Tensor, prefix: Sequence[int]) -> torch.Tensor:
    """The positions (B,) of the level words: after the first `prefix` in the labels (B, S).

    Raises:
        InputError: A row has no such place.
    """
    expected, width = torch.tensor(prefix, device=labels.device), len(prefix)
    if labels.shape[1] > width:
        found = (labels[:, :-1].unfold(1, width, 1) == expected).all(-1)  # (B, S - width)
        if found.any(1).all():
            return found.int().argmax(1) + width
    raise InputError(
        "the answer does not start with `level_prefix` and a level word, or max_length truncates "
        "it",
        ErrorCode.NO_LABELS,
    )


@dataclass(frozen=True)
class ScoreLabels:
    """Adds the opinion score of a sample to its features.

    Attributes:
        prefix_ids: Ids of the answer before the level word.
        level_ids: L ids of the level words.
    """

    prefix_ids: tuple[int, ...]
    level_ids: tuple[int, ...]

    @classmethod
    def from_processor(cls, processor: Owl2Processor, level_prefix: str) -> "ScoreLabels":
        """The labels of the answers "`level_prefix` excellent." to "`level_prefix` bad.".

        Raises:
            InputError: A level word is not one token, or two are equal.
        """
        answers = [_answer_ids(processor, f"{level_prefix} {level}.") for level in LEVELS]
        best, columns = answers[0], enumerate(zip(*answers, strict=False))
        at = next((i for i, ids in columns if len({*ids}) > 1), 0)
        levels = tuple(answer[at] for answer in answers)
        if len({*levels}) < len(LEVELS) or any(
            answer != [*best[:at], level, *best[at + 1 :]]
            for answer, level in zip(answers, levels, strict=True)
        ):
            raise InputError(
                f"the tokenizer does not have each of the levels {', '.join(LEVELS)} as one token",
                ErrorCode.UNSUPPORTED,
            )
        return cls(tuple(best[:at]), levels)

    def add(self, sample: Sample, features: dict[str, Any]) -> None:
        """Add the labels to the features of a sample, in place.

        Raises:
            InputError: It has no opinion score, or its answer no level word.
        """
        if sample.is_description:
            return
        opinion = sample.opinion
        if opinion is None:
            raise InputError(
                "the loss needs 'level_probs', 'gt_score' and 'std' in each row, or the "
                "'task_type' \"description\"",
                ErrorCode.MISSING_VALUE,
            )
        features["level_positions"] = level_positions(features["labels"], self.prefix_ids)
        features["level_probs"] = torch.tensor([opinion.level_probs], dtype=torch.float32)
        features["gt_scores"] = torch.tensor([opinion.gt_score], dtype=torch.float32)
        features["stds"] = torch.tensor([opinion.std], dtype=torch.float32)


def _answer_ids(processor: Owl2Processor, answer: str) -> list[int]:
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]
    labels = processor.for_training(turns)["labels"][0]
    ids: list[int] = labels[labels != IGNORE_INDEX].tolist()
    return ids
