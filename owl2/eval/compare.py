"""``owl2 eval compare A B``: is one better than the other, and on which questions do they differ?

::

    A/answers/NAME.jsonl ┐ by the question's id
    B/answers/NAME.jsonl ┴──► pairs of scores ──paired bootstrap──► B - A with an interval
                              pairs that differ, with their images ──► one HTML page

Compared is the mean of the questions' own scores (0 to 1), which for most tasks is the metric
itself; for others (CIDEr, MME's sum) it moves with it, and the metrics stand beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from owl2 import html
from owl2.errors import InputError
from owl2.eval.image_refs import find_image
from owl2.files import atomic_write_text
from owl2.json_records import json_lines, json_object

RESAMPLES, SEED = 10_000, 0
AT_A_TIME = 250  # resamples: a count for each different score of each is in memory
SHARE = 95  # percent of resamples within the interval
SHOWN = 100  # of each task's questions that differ, on the page

# What should be the same in two runs whose scores are compared, by the entry of a task.
SAME = ("prompt", "shots", "limit", "preprocessing", "decoding", "scorer", "data", "versions")

STYLE = """
.frames { display: grid; grid-template-columns: 1fr 1fr; gap: .3em; align-content: start }
.frames small { display: none }
h3 { font-size: .85em; color: #555; font-weight: normal; margin: 0; word-break: break-all }
p { margin: .3em 0; white-space: pre-wrap; overflow-wrap: anywhere }
.better { color: #06661f } .worse { color: #b00020 }
"""
HEAD = ("task", "n", "A", "B", "B - A", f"{SHARE}% interval", "better", "worse", "other words")

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, as rows of the files of answers."""

    first: Row
    second: Row

    @property
    def difference(self) -> float:
        """How much better the second is, from -1 to 1."""
        return float(self.second["score"] - self.first["score"])


@dataclass(frozen=True)
class Compared:
    """What came of a task.

    Attributes:
        means: of the first's scores and of the second's.
        interval: of the difference of means.
        unlike: what else differs between the two runs, so that the scores hardly can be compared.
    """

    name: str
    pairs: list[Pair]
    means: tuple[float, float]
    interval: tuple[float, float]
    unlike: list[str]

    @property
    def differing(self) -> list[Pair]:
        """The pairs with different scores, the largest differences first."""
        some = [pair for pair in self.pairs if pair.difference]
        return sorted(some, key=lambda pair: -abs(pair.difference))

    def cells(self) -> tuple[str, ...]:
        """As `HEAD` names them."""
        low, high = self.interval
        first, second = self.means
        return (
            self.name,
            f"{len(self.pairs):,}",
            f"{first:.1%}",
            f"{second:.1%}",
            f"{second - first:+.1%}",
            f"{low:+.1%} … {high:+.1%}",
            f"{sum(pair.difference > 0 for pair in self.pairs):,}",
            f"{sum(pair.difference < 0 for pair in self.pairs):,}",
            f"{sum(pair.first['answer'] != pair.second['answer'] for pair in self.pairs):,}",
        )


def compare(first: Path, second: Path, page: Path, console: Console) -> list[Compared]:
    """Compare two runs, print a table and write the page.

    Raises:
        InputError: a folder that `owl2 eval` has not written, or no task with scores in common; a
            page that cannot be written.
    """
    results = [_results(run) for run in (first, second)]
    names = [name for name in results[0]["tasks"] if name in results[1]["tasks"]]
    found = []
    for name in names:
        pairs = _pairs(first, second, name)
        if pairs:
            entries = [result["tasks"][name] for result in results]
            found.append(_compared(name, pairs, entries))
        else:
            _say(console, f"{name}: no question that both have a score for")
    if not found:
        raise InputError(f"{first} and {second} have no task with scores in common.")
    table = Table(title=f"A: {first}, B: {second}", title_justify="left")
    for column in HEAD:
        justify: Literal["left", "right"] = "left" if column == "task" else "right"
        table.add_column(column, justify=justify, no_wrap=column in HEAD[:6])
    for one in found:
        table.add_row(*one.cells())
    console.print(table)
    for one in found:
        for line in one.unlike:
            _say(console, f"{one.name}: {line}")
    atomic_write_text(page, _page(first, second, found))
    _say(console, f"questions on which they differ: {page}")
    return found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Of the mean of paired differences, by the percentile bootstrap.

    Questions are drawn with their two scores together, so what makes a question hard for both does
    not widen it. To draw n questions of which many have the same difference is to draw how many
    there are of each.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng(SEED)
    total = int(counts.sum())
    means = [
        generator.multinomial(total, counts / total, size=AT_A_TIME) @ values / total
        for _ in range(RESAMPLES // AT_A_TIME)
    ]
    rest = (100 - SHARE) / 2
    low, high = np.percentile(np.concatenate(means), [rest, 100 - rest])
    return float(low), float(high)


def _results(run: Path) -> Mapping[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: give two folders that `owl2 eval` wrote.")
    return json_object(path).value


def _pairs(first: Path, second: Path, name: str) -> list[Pair]:
    """Of the questions that both were asked and that have both scores, in the first's order."""
    others = {row["id"]: row for row in _scored(second, name)}
    return [Pair(row, others[row["id"]]) for row in _scored(first, name) if row["id"] in others]


def _scored(run: Path, name: str) -> list[Row]:
    rows = (row.value for row in json_lines(run / "answers" / f"{name}.jsonl"))
    return [row for row in rows if row["score"] is not None]


def _compared(name: str, pairs: list[Pair], entries: Sequence[Mapping[str, Any]]) -> Compared:
    means = tuple(float(np.mean(scores)) for scores in zip(*map(_scores, pairs), strict=True))
    span = interval([pair.difference for pair in pairs])
    return Compared(name, pairs, (means[0], means[1]), span, list(_unlike(*entries)))


def _scores(pair: Pair) -> tuple[float, float]:
    return pair.first["score"], pair.second["score"]


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for entry in SAME:
        a, b = first.get(entry), second.get(entry)
        if isinstance(a, dict) and isinstance(b, dict):
            for key in dict.fromkeys([*a, *b]):
                if a.get(key) != b.get(key):
                    yield f"{entry}.{key} is {_short(a.get(key))} in A, {_short(b.get(key))} in B"
        elif a != b:
            yield f"{entry} is {_short(a)} in A, {_short(b)} in B"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------ the page


def _page(first: Path, second: Path, found: Sequence[Compared]) -> str:
    unlike = "".join(f"<p>{escape(f'{c.name}: {line}')}</p>\n" for c in found for line in c.unlike)
    body = (
        f"<p>A: {escape(str(first))}, B: {escape(str(second))}. Mean scores of the questions; the "
        f"interval is of B - A, from a paired bootstrap of {RESAMPLES:,}.</p>\n"
        + html.table(HEAD, (one.cells() for one in found))
        + unlike
        + "\n".join(_section(one, first / "answers") for one in found)
    )
    return html.page(f"{first} and {second}", body, STYLE)


def _section(one: Compared, answers: Path) -> str:
    differing = one.differing
    left_out = f"; the first {SHOWN} of them" if len(differing) > SHOWN else ""
    articles = "\n".join(_article(pair, answers) for pair in differing[:SHOWN])
    return (
        f"<h2>{escape(one.name)}</h2>\n<p>{len(differing):,} questions have different "
        f"scores{left_out}.</p>\n{articles}"
    )


def _article(pair: Pair, answers: Path) -> str:
    row = pair.first
    names = [name for name in row["images"] if name]
    images = "\n".join(html.thumbnail(find_image(name, answers)) for name in names)
    kind = "images frames" if len(names) > 1 else "images"
    expected = " or ".join(dict.fromkeys(row["expected"]))
    ours = (("A", pair.first, -pair.difference), ("B", pair.second, pair.difference))
    said = "\n".join(
        f'<p class="{"better" if gain > 0 else "worse"}">{letter}: {escape(answer["answer"])} '
        f"({answer['score']:.2f})</p>"
        for letter, answer, gain in ours
    )
    return (
        f'<article><div class="{kind}">{images}</div>\n<div><h3>{escape(row["id"])}</h3>'
        f"<p>{escape(row['question'])}</p>\n<p>Expected: {escape(expected)}</p>\n{said}</div>"
        "</article>"
    )


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
