"""The report of an evaluation: tables on the terminal, report.md and report.html.

Everything comes from ``results.json``, so that the report can be written again after judging.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from owl2 import html
from owl2.errors import ErrorCode, InputError
from owl2.eval.plots import has_matplotlib, plot_radar
from owl2.eval.samples import NO_IMAGE
from owl2.files import atomic_write_text
from owl2.json_records import json_object

STYLE = """
td:last-child, th:last-child { text-align: left }
tbody tr:nth-child(even) { background: #f4f4f4 } img { max-width: 40em }
"""
COLUMNS = ("benchmark", "metric", "n", "ours", "paper", "difference", "no image", "remarks")
TITLES = {
    "captions": "Captions",
    "vqa": "Visual question answering",
    "mllm": "Multimodal benchmarks",
    "hallucination": "Hallucination",
    "text": "Text",
    "video": "Video",
    None: "Other benchmarks",
}

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
    return f"{value * result['scale']:.2f}{'%' if result['scale'] == 100 else ''}"


def text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal whose columns are right-aligned, except for the first one."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def results_table(task: str, result: Mapping[str, Any]) -> Table:
    """A task of ``results.json``: one row for all samples, and one for each category."""
    plain = [name for name in result["metrics"] if not name.endswith(NO_IMAGE)]
    head: dict[str, str] = {}  # titles by metric
    for name in plain:
        head[name] = name
        if f"{name}{NO_IMAGE}" in result["metrics"]:
            head[f"{name}{NO_IMAGE}"] = "no image" if len(plain) == 1 else f"{name}, no image"
    rows = {"all": {"n": result["n"], **result["metrics"]}, **result.get("per_category", {})}
    cells = [
        (name, f"{row['n']:,}", *(format_value(row.get(column), result) for column in head))
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
    for suite, title in TITLES.items():
        own = ((name, result) for name, result in tasks.items() if result["suite"] == suite)
        rows = [row for name, result in own for row in _task_rows(name, result)]
        if rows:
            yield title, COLUMNS, rows
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
    limit = f"only the first {result['limit']} samples" if result["limit"] else ""
    remarks = (limit, f"{invalid} invalid samples" if invalid else "", result["note"])
    first = (f"{result['title']} ({name})", f"{result['n']:,}", "; ".join(filter(None, remarks)))
    # The main metric first, then those of the paper, then all others.
    for metric in dict.fromkeys([result["main_metric"], *paper, *metrics]):
        if metric.endswith(NO_IMAGE):
            continue
        value, reference = metrics.get(metric), paper.get(metric)
        difference = ""
        if value is not None and reference is not None:
            difference = f"{value * result['scale'] - reference:+.2f}"
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
