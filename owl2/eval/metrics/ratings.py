"""Agreement of the scores of a scoring model with opinion scores (Model family §3.4).

`SRCC` and `PLCC` are the correlations of ranks and of values, as in the evaluation scripts of
Q-Align. `PLCC_fit` is the correlation after a logistic function is fitted to the scores, as in
those of DeQA-Score; its rank correlation equals `SRCC`.

`KL`, `JS` and `W` are the distances of the distributions of opinion scores and of the model's
levels: Kullback-Leibler, Jensen-Shannon and Wasserstein. They need label files with standard
deviations (DeQA-Score) and a model with five levels.
"""

from collections.abc import Sequence
from contextlib import suppress

from owl2.data.soft_labels import SCORES as LEVEL_SCORES
from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, Scores
from owl2.eval.samples import Response
from owl2.scoring.agreement import distribution_distance, fit_logistic, score_agreement

FIT_PARAMETERS = 4


def _agreement(responses: Sequence[Response]) -> Scores:
    """Metadata of a sample: `mos`, `normal` (mean and deviation, 1 to 5, or None), `scores`."""
    values = [response.sample.metadata for response in responses]
    mos = [one["mos"] for one in values]
    scores = [one["scores"]["score"] for one in values]
    if len({*mos}) < 2 or len({*scores}) < 2:
        raise InputError(
            "A correlation needs at least two images with different scores.",
            ErrorCode.EMPTY_DATASET,
        )
    srcc, plcc = score_agreement(scores, mos)
    metrics = {"SRCC": srcc, "PLCC": plcc}
    if len(scores) > FIT_PARAMETERS:
        with suppress(RuntimeError):  # the fit does not converge: the metric is absent
            metrics["PLCC_fit"] = score_agreement(fit_logistic(scores, mos), mos).plcc
    levels = [list(one["scores"].get("probabilities", {}).values()) for one in values]
    if all(one["normal"] for one in values) and all(len(p) == len(LEVEL_SCORES) for p in levels):
        means = [sum(LEVEL_SCORES * p) for p in levels]
        spreads = [
            sum(p * (LEVEL_SCORES - mean) ** 2) ** 0.5
            for p, mean in zip(levels, means, strict=True)
        ]
        mean, deviation = zip(*(one["normal"] for one in values), strict=True)
        distance = distribution_distance(mean, deviation, means, spreads)
        metrics |= {"KL": distance.kl, "JS": distance.js, "W": distance.wasserstein}
    return Scores(metrics, _rank_agreement(scores, mos))


def _rank_agreement(scores: Sequence[float], mos: Sequence[float]) -> list[float | None]:
    """For each image, 1 minus the difference of its two ranks, as a share of the largest one."""
    from scipy.stats import rankdata

    difference = abs(rankdata(scores) - rankdata(mos)) / (len(scores) - 1)
    return [float(1 - one) for one in difference]


AGREEMENT = Metric("rating_agreement", "1", "SRCC", _agreement, package="scipy")
