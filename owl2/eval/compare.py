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

from owl2 import html
from owl2.errors import ErrorCode, InputError
from owl2.eval.image_refs import find_image
from owl2.eval.report import load_results, text_table
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

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskComparison:
    """The comparison of two runs on one task.

    Attributes:
        pairs: Rows of the two files of responses with the same id and two scores.
        differences: Conditions that differ between the runs.
    """

    name: str
    pairs: list[tuple[Row, Row]]
    differences: list[str]

    @property
    def differing(self) -> list[tuple[Row, Row]]:
        """The pairs with different scores, the largest differences first."""
        pairs = [pair for pair in self.pairs if _gain(pair)]
        return sorted(pairs, key=lambda pair: -abs(_gain(pair)))

    def cells(self) -> dict[str, str]:
        """The row of the table, by column."""
        first, second = (np.mean([pair[side]["score"] for pair in self.pairs]) for side in (0, 1))
        low, high = bootstrap_interval([_gain(pair) for pair in self.pairs])
        changed = sum(a["response"] != b["response"] for a, b in self.pairs)
        return {
            "task": self.name,
            "n": f"{len(self.pairs):,}",
            "A": f"{first:.1%}",
            "B": f"{second:.1%}",
            "B - A": f"{second - first:+.1%}",
            f"{CONFIDENCE}% interval": f"{low:+.1%} … {high:+.1%}",
            "better": f"{sum(_gain(pair) > 0 for pair in self.pairs):,}",
            "worse": f"{sum(_gain(pair) < 0 for pair in self.pairs):,}",
            "different responses": f"{changed:,}",
        }


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
        found.append(TaskComparison(name, pairs, _differences(tasks[0][name], tasks[1][name])))
        lines += [f"{name}: {difference}" for difference in found[-1].differences]
    if not found:
        raise InputError(
            f"{first} and {second} have no task with scores in common.", ErrorCode.EMPTY_DATASET
        )
    cells = [comparison.cells() for comparison in found]
    head, body = list(cells[0]), [list(row.values()) for row in cells]
    table = text_table(f"A: {first}, B: {second}", head, body)
    for column in table.columns[:6]:
        column.no_wrap = True
    console.print(table)
    text = (
        f"<p>A: {escape(str(first))}, B: {escape(str(second))}. Mean scores of the samples, and a "
        f"paired bootstrap interval of B - A with {RESAMPLES:,} resamples.</p>\n"
        f"{html.table(head, body)}"
    )
    text += "".join(f"<p>{escape(line)}</p>\n" for line in lines)
    text += "".join(_section(comparison, first / "responses") for comparison in found)
    atomic_write_text(page, html.page(f"{first} and {second}", text, STYLE))
    for line in (*lines, f"samples on which they differ: {page}"):
        console.out(line)
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


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The conditions that differ between two entries of ``results.json``."""
    a, b = (dict(_conditions(entry)) for entry in (first, second))
    return [
        f"{key} is {a.get(key)!r:.60} in A, {b.get(key)!r:.60} in B"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _conditions(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in CONDITIONS:
        value = entry.get(key)
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value


# ------------------------------------------------------------------ page


def _section(comparison: TaskComparison, directory: Path) -> str:
    pairs = comparison.differing
    shown = f"; the first {MAX_SHOWN} are shown" if len(pairs) > MAX_SHOWN else ""
    articles = "\n".join(_article(pair, directory) for pair in pairs[:MAX_SHOWN])
    return (
        f"<h2>{escape(comparison.name)}</h2>\n"
        f"<p>{len(pairs):,} samples have different scores{shown}.</p>\n{articles}"
    )


def _article(pair: tuple[Row, Row], directory: Path) -> str:
    row, gain = pair[0], _gain(pair)
    images = "\n".join(html.thumbnail(find_image(name, directory)) for name in row["images"])
    style = "images frames" if len(row["images"]) > 1 else "images"
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
