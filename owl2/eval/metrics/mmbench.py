"""MMBench's circular evaluation (arXiv:2307.06281): a question counts if all its rounds are right.

In each round the options have moved on by one place, so a model that likes a letter gains nothing.
The authors let a language model read answers that name no letter; here those count as wrong
(`choices.letter_of`), and `unparsed` says how many there are.
"""

from collections import defaultdict
from collections.abc import Sequence

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.metrics.choices import right_letters
from owl2.eval.samples import Answer


def _score(answers: Sequence[Answer]) -> Scores:
    """Facts of a question: `options`; `question`, the same for all its rounds."""
    right, parsed = right_letters(answers)
    rounds: dict[str, list[float]] = defaultdict(list)
    for answer, score in zip(answers, right, strict=True):
        rounds[answer.question.facts["question"]].append(score)
    metrics = {
        "accuracy": mean([min(scores) for scores in rounds.values()]),
        "accuracy_of_rounds": mean(right),
        "unparsed": 1 - mean([float(found) for found in parsed]),
    }
    return Scores(metrics, list(right))


CIRCULAR = Metric("mmbench_circular", "1", "accuracy", _score)
