"""POPE and MME: questions with the answer yes or no."""

from collections import defaultdict
from collections.abc import Collection, Sequence

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response

# ------------------------------------------------------------------ POPE


def says_yes(text: str) -> bool:
    """Parse a response as the script of POPE does: "no" or "not" in the first sentence means no.

    Everything else means yes, including an empty response. The script splits at spaces only, so
    that "No\\nthere is" means yes.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _pope(responses: Sequence[Response]) -> Scores:
    """Five values with "yes" as the positive class (arXiv:2305.10355).

    lmms-eval differs: it accepts only the words yes and no, and its yes ratio is that of the
    expected answers.
    """
    predicted = [says_yes(response.text) for response in responses]
    true = [response.sample.expected[0] == "yes" for response in responses]
    scores = [float(one == other) for one, other in zip(predicted, true, strict=True)]
    true_positives = sum(one and other for one, other in zip(predicted, true, strict=True))
    precision = _ratio(true_positives, sum(predicted))
    recall = _ratio(true_positives, sum(true))
    metrics = {
        "f1": _ratio(2 * precision * recall, precision + recall),
        "accuracy": _ratio(sum(scores), len(scores)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _ratio(sum(predicted), len(predicted)),
    }
    return Scores(metrics, [*scores])


def _ratio(part: float, total: float) -> float:
    return part / total if total else 0.0


POPE = Metric("pope", "2", "f1", _pope)

# ------------------------------------------------------------------ MME

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"
)  # fmt: skip


def yes_or_no(text: str) -> str | None:
    """Parse a response as the script of MME does: by its first four characters.

    "Yes, ..." means yes, but "Not sure" and "Nope" mean no. "Y" and "N" are neither (lmms-eval
    accepts them).
    """
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _mme(responses: Sequence[Response]) -> Scores:
    """The sums of accuracy and accuracy+ in percent over the categories (arXiv:2306.13394).

    An image has two questions, one with the answer yes and one with no. Accuracy is the share of
    correct responses, accuracy+ the share of images with two correct responses, so that a category
    is worth up to 200 points.
    """
    correct = [
        float(yes_or_no(response.text) == response.sample.expected[0].lower())
        for response in responses
    ]
    categories: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for response, score in zip(responses, correct, strict=True):
        metadata = response.sample.metadata
        categories[metadata["category"]][metadata["image"]].append(score)
    points = {name: sum(_accuracies(images.values())) for name, images in categories.items()}
    accuracy, accuracy_plus = _accuracies(
        [scores for images in categories.values() for scores in images.values()]
    )
    metrics = {}
    for half, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        known = [points[name] for name in names if name in points]
        if known:
            metrics[half] = sum(known)
    metrics |= {"accuracy": accuracy / 100, "accuracy_plus": accuracy_plus / 100}
    return Scores(metrics, [*correct])


def _accuracies(images: Collection[Sequence[float]]) -> tuple[float, float]:
    """Accuracy and accuracy+ in percent; an image with a single question has no accuracy+."""
    both = [float(all(scores)) for scores in images if len(scores) > 1]
    return 100 * mean([score for scores in images for score in scores]), 100 * mean(both)


MME = Metric("mme", "2", "perception", _mme)
