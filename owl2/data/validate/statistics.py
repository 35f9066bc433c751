"""Statistics of a dataset as numbers, tables and a plot.

::

    SampleStats ──DatasetStats.add──► DatasetStats ──► statistics.json, tables, statistics.png

`DatasetStats` contains histograms (how many samples have 117 tokens). Its size therefore does not
depend on the number of samples, and the statistics of two datasets can be added exactly.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

from rich.table import Table

from owl2.data.packing import first_fit_decreasing
from owl2.errors import ErrorCode
from owl2.fonts import save_figure

RATIO_STEPS = 20  # bins of the aspect ratio per factor of 2: 3.5 % each
SIMULATED_BATCHES = 200
QUANTITIES = {
    "turns": "turns per sample",
    "images": "images per sample",
    "tokens": "tokens per sample, before truncation",
    "labels": "tokens with a label, after truncation",
    "image_edge": "longer edge of an image (pixels)",
}


@dataclass(frozen=True)
class SampleStats:
    """A valid sample.

    Attributes:
        tokens: Before truncation.
        labels: Tokens with a label, after truncation.
        sizes: (width, height) of the images that were opened.
        unused_keys: Keys of the row that are not read.
    """

    turns: int
    images: int
    tokens: int
    labels: int
    is_truncated: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    unused_keys: tuple[str, ...] = ()


@dataclass
class DatasetStats:
    """Counts of samples: by error code in `invalid`, by key in `unused_keys`; the last six are
    value → frequency."""

    usable: int = 0
    truncated: int = 0
    unchecked_images: int = 0
    invalid: Counter[ErrorCode] = field(default_factory=Counter)
    unused_keys: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    image_edge: Counter[int] = field(default_factory=Counter)
    aspect_ratio: Counter[int] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Valid and invalid samples."""
        return self.usable + self.invalid.total()

    def add(self, sample: SampleStats) -> None:
        """Counts a valid sample."""
        self.usable += 1
        self.truncated += sample.is_truncated
        self.unused_keys.update(sample.unused_keys)
        self.unchecked_images += sample.images - len(sample.sizes)
        for name in ("turns", "images", "tokens", "labels"):
            getattr(self, name)[getattr(sample, name)] += 1
        for width, height in sample.sizes:
            self.image_edge[max(width, height)] += 1
            self.aspect_ratio[round(RATIO_STEPS * math.log2(width / height))] += 1

    def merge(self, other: "DatasetStats") -> None:
        """Adds the counts of `other`."""
        for name in (entry.name for entry in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, name, mine + theirs)

    def summary(self) -> dict[str, Any]:
        """The entry of `statistics.json`: counts, and `spread` of each quantity."""
        ratios = spread(self.aspect_ratio)
        return {
            "rows": self.rows,
            "usable": self.usable,
            "invalid": self.invalid.total(),
            "invalid_by_code": dict(sorted(self.invalid.items())),
            "truncated": self.truncated,
            "truncated_share": self.truncated / max(1, self.usable),
            **{name: spread(getattr(self, name)) for name in QUANTITIES},
            "aspect_ratio": {
                key: 2 ** (ratios[key] / RATIO_STEPS)
                for key in ("min", "median", "max")
                if key in ratios
            },
            "unchecked_images": self.unchecked_images,
            "unused_keys": dict(self.unused_keys.most_common()),
        }


def spread(histogram: Mapping[int, int]) -> dict[str, float]:
    """Total, mean and nearest-rank percentiles of a histogram; empty for an empty one."""
    count = sum(histogram.values())
    if not count:
        return {}
    total = sum(value * frequency for value, frequency in histogram.items())
    result: dict[str, float] = {"total": total, "mean": total / count, "min": min(histogram)}
    below = 0
    for value in sorted(histogram):
        below += histogram[value]
        for name, share in {"median": 0.5, "p95": 0.95, "p99": 0.99}.items():
            if name not in result and below >= share * count:
                result[name] = value
    return result | {"max": max(histogram)}


def clipped(histogram: Mapping[int, int], limit: int | None) -> Counter[int]:
    """The histogram with larger values replaced by `limit`."""
    result: Counter[int] = Counter()
    for value, frequency in histogram.items():
        result[value if limit is None else min(value, limit)] += frequency
    return result


def batch_padding(
    lengths: Mapping[int, int], max_length: int | None, batch_size: int
) -> dict[str, float]:
    """The share of padding tokens in simulated random batches: `padded` to the longest sample of a
    batch, or `packed` into rows as long as that sample."""
    lengths = clipped(lengths, max_length)
    values, weights = list(lengths), list(lengths.values())
    rng = Random(0)
    tokens = padded = packed = 0
    for _ in range(SIMULATED_BATCHES if values else 0):
        drawn = rng.choices(values, weights, k=batch_size)
        rows = first_fit_decreasing(drawn, max(drawn))
        tokens += sum(drawn)
        padded += max(drawn) * batch_size
        packed += max(drawn) * len(rows)
    return {
        "batch_size": batch_size,
        "padded": 1 - tokens / max(padded, 1) if tokens else 0.0,
        "packed": 1 - tokens / max(packed, 1) if tokens else 0.0,
    }


# ------------------------------------------------------------------ tables and plots


def dataset_table(stats: Mapping[str, DatasetStats]) -> Table:
    """Rows, valid and invalid samples, tokens and images of each dataset."""
    table = Table(title="samples", title_justify="left")
    table.add_column("dataset", overflow="fold")
    for column in ("rows", "usable", "invalid", "truncated", "tokens", "labels", "images"):
        table.add_column(column, justify="right")
    for name, s in stats.items():
        totals = (int(spread(h).get("total", 0)) for h in (s.tokens, s.labels, s.images))
        counts = (s.rows, s.usable, s.invalid.total(), s.truncated, *totals)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def spread_table(stats: DatasetStats) -> Table:
    """Mean, percentiles and maximum of each quantity."""
    table = Table(title="all usable samples", title_justify="left")
    table.add_column("")
    names = ("mean", "median", "p95", "p99", "max")
    for name in names:
        table.add_column(name, justify="right")
    for quantity, title in QUANTITIES.items():
        if values := spread(getattr(stats, quantity)):
            table.add_row(title, f"{values['mean']:,.1f}", *(f"{values[n]:,}" for n in names[1:]))
    return table


def plot_statistics(path: Path, stats: DatasetStats, title: str, max_length: int | None) -> bool:
    """Plots histograms of the lengths, and of the number, size and aspect ratio of the images.

    Returns:
        False if matplotlib (the extra `plot`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    (lengths, images), (edges, ratios) = figure.subplots(2, 2)
    _histogram(lengths, stats.tokens, "tokens per sample, with image tokens", "samples")
    # Not where the line would compress the histogram into a corner.
    if max_length is not None and max_length < 2 * max(stats.tokens, default=0):
        lengths.axvline(max_length, color="crimson", linestyle="--", label="max_length")
        lengths.legend(frameon=False)
    _histogram(images, stats.images, "images per sample", "samples")
    _histogram(edges, stats.image_edge, "longer edge of an image (pixels)", "images")
    _histogram(ratios, clipped(stats.aspect_ratio, RATIO_STEPS * 3), "aspect ratio", "images")
    ticks = range(-3, 4)
    names = [f"1:{2**-tick}" if tick < 0 else f"{2**tick}:1" for tick in ticks]
    ratios.set_xticks([tick * RATIO_STEPS for tick in ticks], names)
    ratios.set_xlim(-3.1 * RATIO_STEPS, 3.1 * RATIO_STEPS)
    save_figure(figure, path, dpi=120)
    return True


def _histogram(axes: Any, histogram: Mapping[int, int], label: str, unit: str) -> None:
    axes.set(xlabel=label, ylabel=unit)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if not histogram:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="0.5")
        return
    # The last bin has all larger values, so that outliers do not compress the others.
    values = spread(histogram)
    low, high = int(values["min"]), int(min(values["max"], 1.2 * abs(values["p99"]) + 1))
    shown = clipped(histogram, high)
    width = max(1, math.ceil((high - low + 1) / 60))
    bins = [low - 0.5 + width * step for step in range((high - low) // width + 2)]
    axes.set_xlim(low - 0.5 - 0.4 * width, max(bins) + 0.4 * width)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.hist(list(shown), bins=bins, weights=list(shown.values()), color="tab:blue")
    if high < values["max"]:
        axes.set_xlabel(f"{label} (up to {values['max']:,}; the last bin has all larger values)")
