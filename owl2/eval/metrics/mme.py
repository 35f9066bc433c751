"""MME's score: of each category, accuracy and accuracy+, in percent and summed (arXiv:2306.13394).

Every image has two questions, one to be answered yes and one no. Accuracy is the share of right
answers, accuracy+ the share of images with both right; a category is worth up to 200 points. The
figures of one category alone are those of its kind of questions.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Answer

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def yes_or_no(text: str) -> str | None:
    """What an answer means, as the benchmark's own script finds it: by its first four letters.

    "Yes, ..." is yes; but "Not sure" and "Nope" are no.
    """
    said = text.strip().lower().replace(".", "")
    if said in ("y", "n"):
        return {"y": "yes", "n": "no"}[said]
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _score(answers: Sequence[Answer]) -> Scores:
    right = [
        float(yes_or_no(answer.text) == answer.question.expected[0].lower()) for answer in answers
    ]
    categories: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer, score in zip(answers, right, strict=True):
        facts = answer.question.facts
        categories[facts["category"]][facts["image"]].append(score)
    points = {name: sum(_shares(images.values())) for name, images in categories.items()}
    accuracy, accuracy_plus = _shares(
        [scores for images in categories.values() for scores in images.values()]
    )
    metrics = {}
    for half, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        asked = [points[name] for name in names if name in points]
        if asked:
            metrics[half] = sum(asked)
    metrics |= {"accuracy": accuracy / 100, "accuracy_plus": accuracy_plus / 100}
    return Scores(metrics, list(right))


def _shares(images: Collection[Sequence[float]]) -> tuple[float, float]:
    """Accuracy and accuracy+ in percent; an image with one question alone has no accuracy+."""
    both = [float(all(scores)) for scores in images if len(scores) > 1]
    return 100 * mean([score for scores in images for score in scores]), 100 * mean(both)


MME = Metric("mme", "1", "perception", _score)
