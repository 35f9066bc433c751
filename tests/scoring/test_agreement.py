"""Golden values of DeQA-Score: soft labels of opinion scores, and the agreement of predictions."""

import numpy as np
import pytest
import torch

from owl2.data.soft_labels import OpinionRange, OpinionScore, level_probabilities, training_rows
from owl2.errors import ErrorCode
from owl2.scoring.agreement import distribution_distance, fit_logistic, score_agreement
from tests.errors import raises_input_error
from tests.scoring.golden import read


@pytest.mark.parametrize("density", ["pdf", "cdf"])
def test_training_rows(density):
    golden = read("deqa_score", "soft_labels.json")
    scores = {
        name: OpinionScore(float(one["mos"]), float(one["std"]))
        for name, one in golden["mos"].items()
    }
    split = golden["split"]
    rows = training_rows(scores, split["train"], split["test"], density, "IMAGES/")
    assert len(rows) == len(golden[density]["train"])
    for row, expected in zip(rows, golden[density]["train"], strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith("level_probs") or "norm" in key:
                assert row[key] == pytest.approx(value, abs=1e-9), key
            else:
                assert row[key] == value


@pytest.mark.parametrize("std", [0.0, 0.05, 0.3, 1.0, 3.0])
def test_probabilities_have_the_mean_of_the_score(std):
    for mos in np.linspace(1, 5, 33):
        for density in ("pdf", "cdf"):
            probabilities = level_probabilities(OpinionScore(mos, std), density)
            assert probabilities.min() >= 0
            assert probabilities @ [5, 4, 3, 2, 1] == pytest.approx(mos, abs=0.1001)


def test_levels_and_invalid_ranges():
    span = OpinionRange(0, 100)
    words = [span.level(mos) for mos in (0, 20, 20.1, 50, 80.0, 100)]
    assert words == ["bad", "bad", "poor", "fair", "good", "excellent"]
    with raises_input_error(ErrorCode.INVALID_VALUE, "101"):
        span.level(101)
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        OpinionRange.of([OpinionScore(3, 1)] * 2)


def test_agreement():
    golden = read("deqa_score", "metrics.json")
    logits = torch.tensor([list(one.values()) for one in golden["logits"]], dtype=torch.float64)
    weights = torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)
    probabilities = logits.softmax(-1)
    scores = probabilities @ weights
    assert scores.tolist() == pytest.approx(golden["predicted"], abs=1e-5)
    spreads = (probabilities * (weights - scores[:, None]) ** 2).sum(1).sqrt().tolist()
    fitted = fit_logistic(scores.tolist(), golden["gt_score"])
    found = score_agreement(fitted, golden["gt_score"])
    assert found == pytest.approx((golden["srcc"], golden["plcc"]), abs=1e-5)
    span = max(golden["gt_score"]) - min(golden["gt_score"])
    assert fitted == pytest.approx(golden["fitted"], abs=1e-4 * span)
    plain = score_agreement(scores.tolist(), golden["gt_score"])
    assert plain == pytest.approx(
        (golden["srcc_without_fit"], golden["plcc_without_fit"]), abs=1e-5
    )
    distance = distribution_distance(
        golden["gt_score_norm"], golden["std_norm"], scores.tolist(), spreads
    )
    keys = [key for key in golden if key.startswith(("kl", "js", "w"))]
    assert len(keys) == 3
    for key, value in zip(keys, (distance.kl, distance.js, distance.wasserstein), strict=True):
        assert value == pytest.approx(golden[key], abs=1e-5), key
