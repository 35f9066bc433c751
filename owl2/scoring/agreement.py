"""How well predicted scores agree with opinion scores (Model family §3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from owl2.errors import require_package

MAX_EVALUATIONS = 10_000


class ScoreAgreement(NamedTuple):
    """The rank correlation of Spearman and the linear correlation of Pearson."""

    srcc: float
    plcc: float


def score_agreement(predicted: Sequence[float], mos: Sequence[float]) -> ScoreAgreement:
    """SRCC and PLCC of N predicted scores and opinion scores."""
    require_package("scipy", "The correlation of scores", "eval")
    from scipy.stats import pearsonr, spearmanr

    x, y = np.asarray(predicted, float), np.asarray(mos, float)
    return ScoreAgreement(float(spearmanr(x, y)[0]), float(pearsonr(x, y)[0]))


def fit_logistic(predicted: Sequence[float], mos: Sequence[float]) -> list[float]:
    """N predicted scores in the range of the opinion scores, for `score_agreement`.

    A logistic function with four parameters is fitted to them.

    Raises:
        RuntimeError: The fit does not converge.
    """
    require_package("scipy", "The correlation of scores", "eval")
    from scipy.optimize import curve_fit
    from scipy.special import expit

    x, y = np.asarray(predicted, float), np.asarray(mos, float)

    def logistic(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
        return np.asarray((a - b) * expit((x - c) / d) + b)

    start = y.max(), y.min(), x.mean(), x.std() / 4
    parameters, _ = curve_fit(logistic, x, y, p0=start, maxfev=MAX_EVALUATIONS)
    fitted: list[float] = logistic(x, *parameters).tolist()
    return fitted


@dataclass(frozen=True)
class DistributionDistance:
    """Mean distances of normal distributions: Kullback-Leibler, Jensen-Shannon, Wasserstein."""

    kl: float
    js: float
    wasserstein: float


def distribution_distance(
    mos: Sequence[float], std: Sequence[float], scores: Sequence[float], spreads: Sequence[float]
) -> DistributionDistance:
    """The distance of opinion scores and predictions, all (N,) and in the same range.

    Args:
        mos, std: Of the opinion scores; the first argument of the Kullback-Leibler divergence.
        scores, spreads: Predictions.
    """
    m1, s1, m2, s2 = (np.asarray(values, float) for values in (mos, std, scores, spreads))

    def divergence(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> np.ndarray:
        spread = (s1**2 + (m1 - m2) ** 2) / (2 * s2**2 + 1e-8)
        return np.asarray(np.log(s2 / (s1 + 1e-8)) + spread - 0.5)

    mean, middle = (m1 + m2) / 2, np.sqrt((s1**2 + s2**2) / 2)
    js = (divergence(m1, s1, mean, middle) + divergence(m2, s2, mean, middle)) / 2
    wasserstein = np.sqrt((m1 - m2) ** 2 + (s1 - s2) ** 2)
    kl = divergence(m1, s1, m2, s2)
    return DistributionDistance(float(kl.mean()), float(js.mean()), float(wasserstein.mean()))
