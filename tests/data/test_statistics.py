"""Statistics from histograms equal those of the samples."""

import io
import json
import sys
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from owl2.data.validate.statistics import (
    DatasetStats,
    SampleStats,
    batch_padding,
    clipped,
    dataset_table,
    plot_statistics,
    spread,
    spread_table,
)
from owl2.errors import ErrorCode


def some(number: int, seed: int = 0) -> list[SampleStats]:
    rng = Random(seed)
    samples = []
    for _ in range(number):
        images = rng.choice([0, 1, 1, 3])
        sizes = tuple((rng.randint(1, 2000), rng.randint(1, 2000)) for _ in range(images))
        tokens = int(rng.lognormvariate(4, 1)) + 2
        samples.append(SampleStats(2, images, tokens, tokens // 2, tokens > 100, sizes))
    return samples


def stats_of(samples: list[SampleStats]) -> DatasetStats:
    stats = DatasetStats()
    for sample in samples:
        stats.add(sample)
    return stats


@pytest.mark.parametrize("number", [1, 2, 99, 1000])
def test_spread_equals_numpy_percentiles(number):
    values = [sample.tokens for sample in some(number)]
    found = spread(Counter(values))
    assert found["total"] == sum(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert (found["min"], found["max"]) == (min(values), max(values))
    for name, percent in {"median": 50, "p95": 95, "p99": 99}.items():
        assert found[name] == np.percentile(values, percent, method="inverted_cdf")
    assert spread({}) == {}


def test_merged_statistics_equal_the_total():
    samples = some(300)
    total = stats_of(samples)
    total.invalid[ErrorCode.INVALID_ROLE] += 3
    parts = [stats_of(samples[start : start + 70]) for start in range(0, 300, 70)]
    parts[1].invalid[ErrorCode.INVALID_ROLE] += 1
    parts[4].invalid[ErrorCode.INVALID_ROLE] += 2
    added = DatasetStats()
    for part in parts:
        added.merge(part)
    assert added == total
    assert (added.rows, added.usable) == (303, 300)
    assert added.truncated == sum(sample.tokens > 100 for sample in samples)
    assert added.image_edge.total() == added.images[1] + 3 * added.images[3]


def test_the_summary_is_json():
    stats = stats_of(some(50))
    stats.invalid[ErrorCode.INVALID_ROLE] += 1
    summary = json.loads(json.dumps(stats.summary()))
    assert (summary["rows"], summary["usable"], summary["invalid"]) == (51, 50, 1)
    assert summary["invalid_by_code"] == {ErrorCode.INVALID_ROLE: 1}
    ratios = [w / h for sample in some(50) for w, h in sample.sizes]
    assert summary["aspect_ratio"]["median"] == pytest.approx(np.median(ratios), rel=0.1)
    assert DatasetStats().summary()["truncated_share"] == 0


@pytest.mark.parametrize("batch_size", [1, 8])
def test_padding_estimate_equals_simulated_batches(batch_size):
    lengths = Counter(sample.tokens for sample in some(500))
    rng = Random(1)
    tokens = positions = 0
    for _ in range(4000):
        drawn = rng.choices(list(lengths), list(lengths.values()), k=batch_size)
        tokens += sum(drawn)
        positions += batch_size * max(drawn)
    estimate = batch_padding(lengths, None, batch_size)["padded"]
    assert estimate == pytest.approx(1 - tokens / positions, abs=0.01)


def test_padding_estimates_use_truncated_lengths():
    lengths = Counter({10: 90, 500: 10})
    assert clipped(lengths, 100) == {10: 90, 100: 10}
    shares = batch_padding(lengths, 100, 32)
    assert shares["batch_size"] == 32
    assert shares["padded"] > 0.7
    assert shares["packed"] < 0.2
    assert batch_padding(lengths, 100, 32) == shares
    assert batch_padding({50: 9}, 100, 2) == {"batch_size": 2, "padded": 0, "packed": 0}
    assert batch_padding(Counter(), 100, 2)["padded"] == 0


def test_tables_contain_the_counts():
    stats = stats_of([SampleStats(2, 1, 117, 30, True, ((640, 480),)), SampleStats(4, 0, 1200, 40)])
    stats.invalid[ErrorCode.INVALID_ROLE] += 7
    console = Console(file=io.StringIO(), width=120)
    console.print(dataset_table({"rows.json": stats}), spread_table(stats))
    text = console.file.getvalue()
    cells = [
        cell.strip() for cell in next(x for x in text.splitlines() if "rows.json" in x).split("│")
    ]
    assert cells[1:-1] == ["rows.json", "9", "2", "7", "1", "1,317", "70", "1"]
    assert "658.5" in text and "640" in text


@pytest.mark.parametrize(
    "samples", [[], some(1), some(300), [SampleStats(2, 0, 5, 2), SampleStats(2, 0, 10**6, 2)]]
)
def test_the_plot_is_written(tmp_path, samples):
    path = tmp_path / "statistics.png"
    assert plot_statistics(path, stats_of(samples), "a $title_", 100)
    assert Image.open(path).size == (1200, 780)


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_statistics(tmp_path / "statistics.png", DatasetStats(), "", None)
    assert not list(tmp_path.iterdir())
