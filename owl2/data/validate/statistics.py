"""What a look at all samples counted, in numbers, tables and an image.

::

    Seen (one sample) ──Tally.add──► Tally ──summary──► statistics.json, tables, statistics.png

A `Tally` is counts of counts (how many samples have 117 tokens), so it stays small however many
samples there are, and two add up to exactly what one over all of them would be.
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

# Ratios are counted in steps of a 20th of a doubling: about 3.5 % apart.
RATIO_STEPS = 20
DRAWN_BATCHES = 200
QUANTITIES = {
    "turns": "turns a sample",
    "images": "images a sample",
    "tokens": "tokens a sample, uncut",
    "learned": "of these learned, after cutting",
    "edges": "longer edge of an image, pixels",
}


@dataclass(frozen=True)
class Seen:
    """One sample that can be used.

    `tokens`: before any is cut; `learned`: after it; `sizes`: (width, height) of the images that
    were opened, `unopened`: how many were not.
    """

    turns: int
    images: int
    tokens: int
    learned: int
    is_cut: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    unopened: int = 0


@dataclass
class Tally:
    """Counts over rows. `bad` by code; each of the last five: value → how often it was seen."""

    usable: int = 0
    cut: int = 0
    unopened: int = 0
    bad: Counter[ErrorCode] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    learned: Counter[int] = field(default_factory=Counter)
    edges: Counter[int] = field(default_factory=Counter)
    ratios: Counter[int] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """All that were looked at."""
        return self.usable + self.bad.total()

    def add(self, seen: Seen) -> None:
        """Count one more usable sample."""
        self.usable += 1
        self.cut += seen.is_cut
        self.unopened += seen.unopened
        self.turns[seen.turns] += 1
        self.images[seen.images] += 1
        self.tokens[seen.tokens] += 1
        self.learned[seen.learned] += 1
        for width, height in seen.sizes:
            self.edges[max(width, height)] += 1
            self.ratios[round(RATIO_STEPS * math.log2(width / height))] += 1

    def merge(self, other: "Tally") -> None:
        """Count what `other` has counted, too."""
        for part in fields(self):
            own, its = getattr(self, part.name), getattr(other, part.name)
            if isinstance(own, Counter):
                own.update(its)
            else:
                setattr(self, part.name, own + its)

    def summary(self) -> dict[str, Any]:
        """The entry of `statistics.json`; counts of rows, and `spread` of each quantity."""
        ratios = spread(self.ratios)
        return {
            "rows": self.rows,
            "usable": self.usable,
            "bad": self.bad.total(),
            "bad_by_kind": dict(sorted(self.bad.items())),
            "cut": self.cut,
            "cut_share": self.cut / max(1, self.usable),
            **{name: spread(getattr(self, name)) for name in QUANTITIES},
            "width_to_height": {
                key: 2 ** (ratios[key] / RATIO_STEPS) for key in ("min", "median", "max")
            }
            if ratios
            else {},
            "images_not_opened": self.unopened,
        }


def spread(counts: Mapping[int, int]) -> dict[str, float]:
    """Values with how often each was seen → their total, mean and percentiles (nearest rank)."""
    number = sum(counts.values())
    if not number:
        return {}
    total = sum(value * count for value, count in counts.items())
    found: dict[str, float] = {"total": total, "mean": total / number, "min": min(counts)}
    ranks = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    below = 0
    for value in sorted(counts):
        below += counts[value]
        for name, share in ranks.items():
            if name not in found and below >= share * number:
                found[name] = value
    return found | {"max": max(counts)}


def padding_share(lengths: Mapping[int, int], batch_size: int) -> float:
    """The share of padding in batches of so many samples drawn at random, on average.

    Each row is as long as the longest of its batch; the chance that the longest has at most v
    tokens is that of one sample to the power of `batch_size`.
    """
    number = sum(lengths.values())
    if not number:
        return 0.0
    longest, below, before = 0.0, 0, 0.0
    for value in sorted(lengths):
        below += lengths[value]
        now = (below / number) ** batch_size
        longest += value * (now - before)
        before = now
    mean = sum(value * count for value, count in lengths.items()) / number
    return 1 - mean / longest


def batches(
    lengths: Mapping[int, int], max_length: int | None, batch_size: int
) -> dict[str, float]:
    """The share of places without a token: `padded` to the longest of a batch, or `packed` into
    rows as long as a batch's longest sample."""
    cut = clipped(lengths, max_length)
    return {
        "batch_size": batch_size,
        "padded": padding_share(cut, batch_size),
        "packed": _packed_share(cut, batch_size),
    }


def _packed_share(lengths: Mapping[int, int], batch_size: int) -> float:
    """Found by packing some batches of samples drawn at random."""
    values, weights = list(lengths), list(lengths.values())
    chance = Random(0)
    tokens = places = 0
    for _ in range(DRAWN_BATCHES if values else 0):
        drawn = chance.choices(values, weights, k=batch_size)
        rows = [sum(drawn[at] for at in row) for row in first_fit_decreasing(drawn, max(drawn))]
        tokens += sum(rows)
        places += len(rows) * max(rows)
    return 1 - tokens / places if places else 0.0


def clipped(lengths: Mapping[int, int], longest: int | None) -> Counter[int]:
    """The same, longer ones cut to `longest`."""
    cut: Counter[int] = Counter()
    for value, count in lengths.items():
        cut[value if longest is None else min(value, longest)] += count
    return cut


# ------------------------------------------------------------------ for people


def sources_table(tallies: Mapping[str, Tally]) -> Table:
    """Rows, usable and bad ones, tokens and images of each source."""
    table = Table(title="samples", title_justify="left")
    table.add_column("source", overflow="fold")
    for column in ("rows", "usable", "bad", "cut", "tokens", "learned", "images"):
        table.add_column(column, justify="right")
    for name, tally in tallies.items():
        sums = (spread(counts) for counts in (tally.tokens, tally.learned, tally.images))
        totals = [int(found.get("total", 0)) for found in sums]
        counts = [tally.rows, tally.usable, tally.bad.total(), tally.cut, *totals]
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def spread_table(tally: Tally) -> Table:
    """Mean, percentiles and the largest of each quantity, over all sources."""
    table = Table(title="all usable samples", title_justify="left")
    table.add_column("")
    names = ("mean", "median", "p95", "p99", "max")
    for name in names:
        table.add_column(name, justify="right")
    for quantity, title in QUANTITIES.items():
        if found := spread(getattr(tally, quantity)):
            table.add_row(title, f"{found['mean']:,.1f}", *(f"{found[n]:,}" for n in names[1:]))
    return table


def plot_statistics(path: Path, tally: Tally, title: str, max_length: int | None) -> bool:
    """Draw how long samples are, how many images they have, and how large those are.

    Returns:
        False if matplotlib (the extra ``plot``) is not installed, so nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    (lengths, images), (edges, ratios) = figure.subplots(2, 2)
    _histogram(lengths, tally.tokens, "tokens a sample, images' too")
    # Not where it would press all that there is into a corner.
    if max_length is not None and max_length < 2 * max(tally.tokens, default=0):
        lengths.axvline(max_length, color="crimson", linestyle="--", label="max_length")
        lengths.legend(frameon=False)
    _histogram(images, tally.images, "images a sample")
    _histogram(edges, tally.edges, "longer edge of an image, pixels")
    _histogram(ratios, clipped(tally.ratios, RATIO_STEPS * 3), "width : height of an image")
    ticks = range(-3, 4)
    names = [f"1:{2**-tick}" if tick < 0 else f"{2**tick}:1" for tick in ticks]
    ratios.set_xticks([tick * RATIO_STEPS for tick in ticks], names)
    ratios.set_xlim(-3.1 * RATIO_STEPS, 3.1 * RATIO_STEPS)
    figure.savefig(path, dpi=120)
    return True


def _histogram(axes: Any, counts: Mapping[int, int], label: str) -> None:
    axes.set(xlabel=label, ylabel="samples" if "sample" in label else "images")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if not counts:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="0.5")
        return
    # Few outliers must not press all the others into one bar: what is beyond goes into the last.
    found = spread(counts)
    low, high = int(found["min"]), int(min(found["max"], 1.2 * abs(found["p99"]) + 1))
    shown = clipped(counts, high)
    width = max(1, math.ceil((high - low + 1) / 60))
    bins = [low - 0.5 + width * step for step in range((high - low) // width + 2)]
    axes.set_xlim(low - 0.5 - 0.4 * width, max(bins) + 0.4 * width)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.hist(list(shown), bins=bins, weights=list(shown.values()), color="tab:blue")
    if high < found["max"]:
        axes.set_xlabel(f"{label} (up to {found['max']:,}; the last bar has all above)")
