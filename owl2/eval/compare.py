"""``owl2 eval compare A B``: is one model better, and on which samples do they differ?

::

    A/responses/NAME.jsonl ┐ by the id of the sample
    B/responses/NAME.jsonl ┴──► pairs of scores ──paired bootstrap──► B - A with an interval
                                pairs that differ, with their images ──► one HTML page

The mean of the scores of the samples (0 to 1) is compared. It equals the metric of most tasks; for
others (CIDEr, the sum of MME) it is correlated with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from owl2 import html
from owl2.errors import ErrorCode, InputError
from owl2.eval.image_refs import find_image
from owl2.eval.report import load_results
from owl2.files import atomic_write_text
from owl2.json_records import json_lines

RESAMPLES, SEED = 10_000, 0
RESAMPLES_PER_STEP = 250  # limits memory
CONFIDENCE = 95  # percent
MAX_SHOWN = 100  # differing samples of each task on the page
# Conditions that must be equal in two comparable runs, by their keys in results.json.
CONDITIONS = (
    "prompt", "num_fewshot", "limit", "preprocessing", "generation", "metric", "data", "versions"
)  # fmt: skip
STYLE = """
.frames { display: grid; grid-template-columns: 1fr 1fr; gap: .3em; align-content: start }
.frames small { display: none }
h3 { font-size: .85em; color: #555; font-weight: normal; margin: 0; word-break: break-all }
p { margin: .3em 0; white-space: pre-wrap; overflow-wrap: anywhere }
.better { color: #06661f } .worse { color: #b00020 }
"""
INTERVAL = f"{CONFIDENCE}% interval"
COLUMNS = ("task", "n", "A", "B", "B - A", INTERVAL, "better", "worse", "different responses")

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskComparison:
    """The comparison of two runs on one task.

    Attributes:
        pairs: Rows of the two files of responses with the same id.
        means: The mean scores of both runs.
        interval: Of the difference of the means.
        differences: Conditions that differ between the runs.
    """

    name: str
    pairs: list[tuple[Row, Row]]
    means: tuple[float, float]
    interval: tuple[float, float]
    differences: list[str]

    @property
    def differing(self) -> list[tuple[Row, Row]]:
        """The pairs with different scores, the largest differences first."""
        pairs = [pair for pair in self.pairs if _gain(pair)]
        return sorted(pairs, key=lambda pair: -abs(_gain(pair)))

    def cells(self) -> tuple[str, ...]:
        """The row of the table with the head `COLUMNS`."""
        (low, high), (first, second) = self.interval, self.means
        return (
            self.name,
            f"{len(self.pairs):,}",
            f"{first:.1%}",
            f"{second:.1%}",
            f"{second - first:+.1%}",
            f"{low:+.1%} … {high:+.1%}",
            f"{sum(_gain(pair) > 0 for pair in self.pairs):,}",
            f"{sum(_gain(pair) < 0 for pair in self.pairs):,}",
            f"{sum(a['response'] != b['response'] for a, b in self.pairs):,}",
        )


def compare(first: Path, second: Path, page: Path, console: Console) -> list[TaskComparison]:
    """Compare two runs, print a table and write the page.

    Raises:
        InputError: A directory was not written by `owl2 eval`; the runs share no scored task; the
            page cannot be written.
    """
    tasks = [load_results(run)["tasks"] for run in (first, second)]
    found: list[TaskComparison] = []
    lines: list[str] = []
    for name in (name for name in tasks[0] if name in tasks[1]):
        rows = [_scored_rows(run, name) for run in (first, second)]
        pairs = [(row, rows[1][key]) for key, row in rows[0].items() if key in rows[1]]
        if not pairs:
            lines.append(f"{name}: no sample has a score in both runs")
            continue
        scores = np.array([[a["score"], b["score"]] for a, b in pairs], dtype=np.float64)
        means = (float(scores[:, 0].mean()), float(scores[:, 1].mean()))
        interval = bootstrap_interval([_gain(pair) for pair in pairs])
        differences = list(_condition_differences(tasks[0][name], tasks[1][name]))
        found.append(TaskComparison(name, pairs, means, interval, differences))
        lines += [f"{name}: {difference}" for difference in differences]
    if not found:
        raise InputError(
            f"{first} and {second} have no task with scores in common.", ErrorCode.EMPTY_DATASET
        )
    table = Table(title=f"A: {first}, B: {second}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in COLUMNS[:6])
        table.columns[-1].justify = "left" if column == "task" else "right"
    for comparison in found:
        table.add_row(*comparison.cells())
    console.print(table)
    atomic_write_text(page, _page(first, second, found))
    for line in (*lines, f"samples on which they differ: {page}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return found


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of paired differences.

    Samples are drawn with both of their scores, so that the difficulty of a sample does not widen
    the interval. Equal differences are drawn together, by their counts.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng(SEED)
    total = int(counts.sum())
    means = [
        generator.multinomial(total, counts / total, size=RESAMPLES_PER_STEP) @ values / total
        for _ in range(RESAMPLES // RESAMPLES_PER_STEP)
    ]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def _gain(pair: tuple[Row, Row]) -> float:
    return float(pair[1]["score"] - pair[0]["score"])


def _scored_rows(run: Path, name: str) -> dict[str, Row]:
    rows = (record.value for record in json_lines(run / "responses" / f"{name}.jsonl"))
    return {row["id"]: row for row in rows if row["score"] is not None}


def _condition_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for key in CONDITIONS:
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            for name in dict.fromkeys([*a, *b]):
                if a.get(name) != b.get(name):
                    yield f"{key}.{name} is {_short(a.get(name))} in A, {_short(b.get(name))} in B"
        elif a != b:
            yield f"{key} is {_short(a)} in A, {_short(b)} in B"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------ page


def _page(first: Path, second: Path, found: Sequence[TaskComparison]) -> str:
    body = (
        f"<p>A: {escape(str(first))}, B: {escape(str(second))}. Mean scores of the samples, and a "
        f"paired bootstrap interval of B - A with {RESAMPLES:,} resamples.</p>\n"
        + html.table(COLUMNS, (comparison.cells() for comparison in found))
    )
    for comparison in found:
        for difference in comparison.differences:
            body += f"<p>{escape(f'{comparison.name}: {difference}')}</p>\n"
    for comparison in found:
        pairs = comparison.differing
        shown = f"; the first {MAX_SHOWN} are shown" if len(pairs) > MAX_SHOWN else ""
        body += f"<h2>{escape(comparison.name)}</h2>\n"
        body += f"<p>{len(pairs):,} samples have different scores{shown}.</p>\n"
        body += "\n".join(_article(pair, first / "responses") for pair in pairs[:MAX_SHOWN])
    return html.page(f"{first} and {second}", body, STYLE)


def _article(pair: tuple[Row, Row], directory: Path) -> str:
    row, gain = pair[0], _gain(pair)
    names = [name for name in row["images"] if name]
    images = "\n".join(html.thumbnail(find_image(name, directory)) for name in names)
    style = "images frames" if len(names) > 1 else "images"
    expected = " or ".join(dict.fromkeys(row["expected"]))
    responses = "\n".join(
        f'<p class="{"better" if own > 0 else "worse"}">{name}: {escape(side["response"])} '
        f"({side['score']:.2f})</p>"
        for name, side, own in (("A", row, -gain), ("B", pair[1], gain))
    )
    return (
        f'<article><div class="{style}">{images}</div>\n<div><h3>{escape(row["id"])}</h3>'
        f"<p>{escape(row['question'])}</p>\n<p>Expected: {escape(expected)}</p>\n{responses}</div>"
        "</article>"
    )
