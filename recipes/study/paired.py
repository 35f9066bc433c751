"""Statistics of a study: paired differences with intervals, and the power of a comparison.

Two arms have the same seeds, and with the same seed the same data in the same order. The
differences of the scores by seed are treated as a sample of a normal distribution.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95
POWER = 0.8


class PairedDifference(NamedTuple):
    """The mean of the differences of `count` pairs, and its 95 % interval.

    With one pair there is no interval: `low` and `high` are NaN.
    """

    mean: float
    low: float
    high: float
    sd: float
    count: int


def paired_difference(
    scores: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedDifference | None:
    """The difference of two arms, whose scores are given by seed; None without a common seed."""
    differences = [scores[seed] - baseline[seed] for seed in sorted(scores.keys() & baseline)]
    if not differences:
        return None
    mean, half_width, sd = interval(differences)
    return PairedDifference(mean, mean - half_width, mean + half_width, sd, len(differences))


def p_value(difference: PairedDifference) -> float:
    """That of the two-sided paired t-test; NaN with one pair, and if all differences are equal."""
    if difference.count < 2 or difference.sd == 0:
        return math.nan
    statistic = abs(difference.mean) * math.sqrt(difference.count) / difference.sd
    return float(2 * stats.t.sf(statistic, difference.count - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number (Holm); those that are NaN are not counted."""
    ordered = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted, largest = {}, 0.0
    for index, (p, name) in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ordered) - index)))
        adjusted[name] = largest
    return adjusted


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, half width of its 95 % interval (Student's t), and standard deviation."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan, math.nan
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    return mean, quantile * sd / math.sqrt(count), sd


def detectable_difference(sd: float, count: int, power: float = POWER) -> float:
    """The smallest true difference that a two-sided paired t-test finds with a probability.

    Args:
        sd: Standard deviation of the paired difference.
        count: Number of pairs, at least 2.
    """
    low, high = 0.0, 100.0  # in standard deviations
    for _ in range(60):
        middle = (low + high) / 2
        if _power(middle, count) < power:
            low = middle
        else:
            high = middle
    return sd * high


def _power(effect: float, count: int) -> float:
    """The probability that the test finds an effect, given in standard deviations."""
    limit = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    shift = effect * math.sqrt(count)
    # The second tail is below 1e-3 for effects of interest, and scipy's is NaN for large shifts.
    return float(1 - stats.nct.cdf(limit, count - 1, shift)) if shift < 30 else 1.0
