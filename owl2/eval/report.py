"""The report of an evaluation: tables on the terminal, report.md, report.html and plots.

The reports come from ``results.json``, so that they can be written again after judging. The plots
need matplotlib (the extra ``plot``); call `has_matplotlib` first.
"""

import importlib.util
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from owl2 import html
from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import SampleScore
from owl2.eval.samples import NO_IMAGE, Response, evenly_spaced
from owl2.eval.task_config import SUITES
from owl2.files import atomic_write_text
from owl2.fonts import save_figure
from owl2.json_records import json_object
from owl2.processing.image_io import load_image
from owl2.processing.messages import parse_messages

STYLE = """
td:last-child, th:last-child { text-align: left }
tbody tr:nth-child(even) { background: #f4f4f4 } img { max-width: 40em }
"""
COLUMNS = ("benchmark", "metric", "n", "ours", "paper", "difference", "no image", "remarks")
PLOT_COLUMNS = 4
SHOWN_SAMPLES = 8  # evenly spaced over all samples, correct or not
MISTAKES = 4  # additional samples with a score of 0
MIN_AXES = 3  # of a radar plot

Row = tuple[str, ...]


def load_results(output: Path) -> dict[str, Any]:
    """The content of ``results.json``. Raises `InputError` if it does not exist."""
    path = output / "results.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist. Give a directory that `owl2 eval` wrote.",
            ErrorCode.FILE_NOT_FOUND,
        )
    return json_object(path).value


def format_value(value: float | None, result: Mapping[str, Any]) -> str:
    """The value of a metric in the unit of the paper; "" for None."""
    if value is None:
        return ""
    percent = "%" if result["scale"] == 100 else ""
    return f"{value * result['scale']:.{result['digits']}f}{percent}"


def text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal whose columns are right-aligned, except for the first one."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def results_table(task: str, result: Mapping[str, Any]) -> Table:
    """A task of ``results.json``: rows for all samples, each category, and published models."""
    plain = [name for name in result["metrics"] if not name.endswith(NO_IMAGE)]
    head: dict[str, str] = {}  # titles by metric
    for name in plain:
        head[name] = name
        if f"{name}{NO_IMAGE}" in result["metrics"]:
            head[f"{name}{NO_IMAGE}"] = "no image" if len(plain) == 1 else f"{name}, no image"
    rows = {"all": {"n": result["n"], **result["metrics"]}, **result.get("per_category", {})}
    rows |= {f"{name}, published": row for name, row in result["published"].items()}
    cells = [
        (
            name,
            f"{row['n']:,}" if "n" in row else "",
            *(format_value(row.get(column), result) for column in head),
        )
        for name, row in rows.items()
    ]
    return text_table(task, ("samples", "n", *head.values()), cells)


def write_report(output: Path) -> None:
    """Write ``report.md`` and ``report.html`` from ``results.json``.

    ``radar.png`` is written as well if three or more tasks have a result of the paper.

    Raises:
        InputError: ``results.json`` does not exist, or a file cannot be written.
    """
    results = load_results(output)
    radar, name = output / "radar.png", Path(results["model"]).name
    radar.unlink(missing_ok=True)
    has_radar = has_matplotlib() and plot_radar(radar, ratios_to_paper(results), name)
    text = f"# {results['model']}\n"
    body = ""
    for title, head, rows in _tables(results):
        lines = [head, ["---"] * len(head), *rows]
        text += f"\n## {title}\n\n" + "".join(f"{_markdown_row(line)}\n" for line in lines)
        body += f"<h2>{escape(title)}</h2>\n{html.table(head, rows)}"
    if has_radar:
        text += "\n![Compared with the paper](radar.png)\n"
        body += f"<h2>Compared with the paper</h2>\n{html.embed(radar.read_bytes(), 'image/png')}\n"
    atomic_write_text(output / "report.md", text)
    atomic_write_text(output / "report.html", html.page(results["model"], body, STYLE))


def ratios_to_paper(results: Mapping[str, Any]) -> dict[str, float]:
    """Our value divided by that of the paper, for the main metric of each task with both."""
    return {
        name: result["metrics"][main] * result["scale"] / result["paper"][main]
        for name, result in results["tasks"].items()
        if (main := result["main_metric"]) in result["metrics"] and main in result["paper"]
    }


def _tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[Row]]]:
    """Title, head and rows of each table."""
    tasks = results["tasks"]
    for suite, title in (*SUITES.items(), (None, "Other benchmarks")):
        own = ((name, result) for name, result in tasks.items() if result["suite"] == suite)
        rows = [row for name, result in own for row in _task_rows(name, result)]
        if rows:
            yield title, COLUMNS, rows
    published: list[Row] = [
        (f"{result['title']} ({name})", model, metric, f"{value:g}")
        for name, result in tasks.items()
        for model, values in result["published"].items()
        for metric, value in values.items()
    ]
    if published:
        yield "Published scores", ("benchmark", "model", "metric", "value"), published
    if results["skipped"]:
        yield "Skipped", ("benchmark", "reason"), list(results["skipped"].items())
    invalid: list[Row] = [
        (name, item["id"], item["reason"])
        for name, result in tasks.items()
        for item in result["invalid"]["first"]
    ]
    if invalid:
        yield "Invalid samples (the first ones)", ("benchmark", "sample", "reason"), invalid
    environment, first = results["environment"], next(iter(tasks.values()))
    generation, images = first["generation"], first["preprocessing"]
    conditions = {
        "weights": results["weights_fingerprint"][:16],
        "images": f"{images['size']} x {images['size']} pixels, {images['policy']}",
        "dtype": generation["dtype"],
        "modality-adaptive module": "on" if generation["mam"] else "off",
        "machine": f"{environment['name']}, {environment['processes']} processes",
        "versions": ", ".join(f"{name} {value}" for name, value in first["versions"].items()),
    }
    yield "Conditions", ("", ""), list(conditions.items())


def _task_rows(name: str, result: Mapping[str, Any]) -> Iterator[Row]:
    paper, metrics, invalid = result["paper"], result["metrics"], result["invalid"]["n"]
    limit = f"only {result['limit']} samples, of all categories" if result["limit"] else ""
    remarks = (limit, f"{invalid} invalid samples" if invalid else "", result["note"])
    first = (f"{result['title']} ({name})", f"{result['n']:,}", "; ".join(filter(None, remarks)))
    # The main metric first, then those of the paper, then all others.
    for metric in dict.fromkeys([result["main_metric"], *paper, *metrics]):
        if metric.endswith(NO_IMAGE):
            continue
        value, reference = metrics.get(metric), paper.get(metric)
        difference = ""
        if value is not None and reference is not None:
            difference = f"{value * result['scale'] - reference:+.{result['digits']}f}"
        yield (
            first[0],
            metric,
            first[1],
            format_value(value, result) or "to be judged",
            "" if reference is None else f"{reference:g}",
            difference,
            format_value(metrics.get(f"{metric}{NO_IMAGE}"), result),
            first[2],
        )
        first = ("", "", "")  # on the first row only


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"


# ------------------------------------------------------------------ plots


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_examples(path: Path, scored: Sequence[tuple[Response, SampleScore]], title: str) -> None:
    """Write a grid of images with question and response: samples, and mistakes below them."""
    shown = evenly_spaced(scored, SHOWN_SAMPLES)
    mistakes = [pair for pair in scored if pair[1] == 0 and pair not in shown]
    shown += evenly_spaced(mistakes, MISTAKES)
    rows = -(-len(shown) // PLOT_COLUMNS)
    with _figure(path, 2.6 * PLOT_COLUMNS, 0.6 + 2.9 * rows) as figure:
        figure.suptitle(title)
        grid = figure.subplots(rows, PLOT_COLUMNS, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (response, score) in zip(grid, shown, strict=False):
            try:
                for image in parse_messages(response.sample.messages).images[:1]:
                    axes.imshow(load_image(image))
            except InputError as error:  # the file was removed during the evaluation
                axes.text(0.5, 0.5, textwrap.fill(str(error), 30), ha="center")
            question = textwrap.fill(textwrap.shorten(response.sample.question, 90), 30)
            text = response.text
            if score == 0 and response.sample.expected:
                text += f" (not {' or '.join(dict.fromkeys(response.sample.expected))})"
            caption = f"{question}\n{textwrap.shorten(text, 34)}"
            axes.set_title(caption, fontsize=9, color=_color(score))


def plot_radar(path: Path, ratios: Mapping[str, float], name: str) -> bool:
    """Write a plot with one axis per benchmark; the results of the paper are the unit circle.

    Args:
        ratios: Our values divided by those of the paper, by benchmark.

    Returns:
        False if there are too few benchmarks for a plot.
    """
    if len(ratios) < MIN_AXES:
        return False
    angles = [2 * math.pi * index / len(ratios) for index in range(len(ratios))]
    with _figure(path, 7, 7) as figure:
        axes = figure.add_subplot(projection="polar")
        for values, label, color in (
            ([1.0] * len(ratios), "paper", "tab:gray"),
            (list(ratios.values()), name, "tab:blue"),
        ):
            closed = [*values, values[0]]
            axes.plot([*angles, angles[0]], closed, label=label, color=color)
            axes.fill([*angles, angles[0]], closed, alpha=0.12, color=color)
        axes.set_xticks(angles, [""] * len(ratios))
        edge = max(1.1, *ratios.values())
        axes.set_ylim(0, edge)
        for angle, label in zip(angles, ratios, strict=True):
            side = math.cos(angle)
            align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            axes.text(angle, 1.05 * edge, label, ha=align, va="center")
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["25%", "50%", "75%", "100%"])
        axes.legend(loc="upper right", bbox_to_anchor=(1.25, 1.15))
    return True


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure with a size in inches, which is written to `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Dollar signs in responses do not start a formula.
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        save_figure(figure, path, dpi=120)


def _color(score: SampleScore) -> str:
    if score is None:
        return "black"
    return "crimson" if score == 0 else "green" if score >= 0.5 else "darkorange"
