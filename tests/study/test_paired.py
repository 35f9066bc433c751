"""Paired differences and the power of a comparison."""

import math

import numpy as np
import pytest
from paired import detectable_difference, holm, interval, p_value, paired_difference
from scipy import stats


def test_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(0.7, 0.1, 6), rng.normal(0.6, 0.1, 6)
    found = paired_difference(dict(enumerate(arm)), dict(enumerate(baseline)))
    expected = stats.ttest_rel(arm, baseline)
    low, high = expected.confidence_interval(0.95)
    assert found.count == 6
    assert found[:3] == pytest.approx((expected.statistic * found.sd / math.sqrt(6), low, high))
    assert found.sd == pytest.approx(np.std(arm - baseline, ddof=1))
    assert p_value(found) == pytest.approx(expected.pvalue)
    assert math.isnan(p_value(found._replace(sd=0.0)))


def test_correction_for_several_scores():
    found = holm({"a": 0.02, "b": 0.01, "c": math.nan, "d": 0.6, "e": 0.019})
    assert found == pytest.approx({"b": 0.04, "e": 0.057, "a": 0.057, "d": 0.6})


def test_only_common_seeds_are_compared():
    found = paired_difference({0: 1.0, 1: 2.0, 3: 9.0}, {1: 1.5, 0: 0.25, 2: 7.0})
    assert (found.mean, found.count) == (0.625, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_no_interval():
    found = paired_difference({0: 1.0}, {0: 0.5})
    assert found.mean == 0.5
    assert math.isnan(found.low) and math.isnan(found.high)
    mean, half_width, sd = interval([3.0])
    assert mean == 3.0 and math.isnan(half_width) and math.isnan(sd)


# Effect sizes of the paired t-test, two-sided at 5 %, from a table of its power.
@pytest.mark.parametrize(
    ("count", "power", "effect"), [(5, 0.8, 1.6822), (10, 0.8, 0.9965), (10, 0.5, 0.6955)]
)
def test_detectable_difference(count, power, effect):
    assert detectable_difference(2.0, count, power) == pytest.approx(2 * effect, rel=2e-3)


def test_detectable_differences_are_found_with_this_probability():
    rng = np.random.default_rng(1)
    difference = detectable_difference(0.02, 5)
    samples = rng.normal(difference, 0.02, (20000, 5))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)
