"""POPE's five figures, with "yes" as the positive class (arXiv:2305.10355).

lmms-eval differs: it takes nothing but the bare words yes and no, and its yes-ratio is that of the
right answers.
"""

from collections.abc import Sequence

from owl2.eval.metrics import Metric, Scores
from owl2.eval.samples import Answer


def says_yes(text: str) -> bool:
    """As the benchmark's own script reads answers: "no" or "not" in the first sentence is no.

    Everything else is yes, an empty answer too.
    """
    words = text.partition(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def _score(answers: Sequence[Answer]) -> Scores:
    said = [says_yes(answer.text) for answer in answers]
    true = [answer.question.expected[0] == "yes" for answer in answers]
    each = [float(one == other) for one, other in zip(said, true, strict=True)]
    hits = sum(one and other for one, other in zip(said, true, strict=True))
    precision = _share(hits, sum(said))
    recall = _share(hits, sum(true))
    metrics = {
        "f1": _share(2 * precision * recall, precision + recall),
        "accuracy": _share(sum(each), len(each)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _share(sum(said), len(said)),
    }
    return Scores(metrics, list(each))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


POPE = Metric("pope", "1", "f1", _score)
