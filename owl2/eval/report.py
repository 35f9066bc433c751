"""What is left of an evaluation for people: tables on the terminal, report.md, report.html.

All of it comes from ``results.json``, so it can be written anew once a judge has spoken.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from owl2.eval.plots import draw_radar, has_matplotlib
from owl2.eval.results import BLIND
from owl2.eval.task_config import SUITES
from owl2.files import atomic_write_text
from owl2.json_records import json_object

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse } th, td { padding: .25em .8em; text-align: right }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left }
thead { border-bottom: 2px solid #888 } tbody tr:nth-child(even) { background: #f4f4f4 }
img { max-width: 40em }
"""
HEAD = ("benchmark", "figure", "n", "ours", "paper", "difference", "blind", "remarks")
TITLES = {
    "captions": "Captions",
    "vqa": "Visual question answering",
    "mllm": "Multimodal benchmarks",
    "hallucination": "Hallucination",
    "text": "Text",
    "video": "Video",
    None: "Others",
}
assert set(SUITES) < set(TITLES)

Row = tuple[str, ...]


def shown(value: float, result: Mapping[str, Any]) -> str:
    """A metric's value as the paper tells it."""
    return f"{value * result['scale']:.2f}{'%' if result['scale'] == 100 else ''}"


def results_table(task: str, result: Mapping[str, Any]) -> Table:
    """A task's entry of ``results.json``: all questions, then kind by kind."""
    metrics = [name for name in result["metrics"] if not name.endswith(BLIND)]
    table = Table(title=task, title_justify="left")
    table.add_column("questions")
    for column in ("n", *(column for name in metrics for column in _columns(name, result))):
        table.add_column(column, justify="right")
    rows = {"all": {"n": result["n"], **result["metrics"]}, **result.get("by_answer_kind", {})}
    for name, row in rows.items():
        cells = [
            "" if row.get(key) is None else shown(row[key], result)
            for metric in metrics
            for key in _keys(metric, result)
        ]
        table.add_row(name, f"{row['n']:,}", *cells)
    return table


def _keys(metric: str, result: Mapping[str, Any]) -> list[str]:
    return [key for key in (metric, f"{metric}{BLIND}") if key in result["metrics"]]


def _columns(metric: str, result: Mapping[str, Any]) -> list[str]:
    alone = result["metrics"].keys() <= {metric, f"{metric}{BLIND}"}
    return [metric, "blind" if alone else f"{metric}, blind"][: len(_keys(metric, result))]


# ------------------------------------------------------------------ report.md, report.html


def write_report(output: Path) -> None:
    """``report.md``, ``report.html`` and, against three figures of the paper or more,
    ``radar.png``, from ``results.json``.

    Raises:
        InputError: there is no ``results.json``, or a file cannot be written.
    """
    results = json_object(output / "results.json").value
    radar = output / "radar.png"
    shares = paper_shares(results)
    drawn = has_matplotlib() and draw_radar(radar, shares, Path(results["model"]).name)
    if not drawn:
        radar.unlink(missing_ok=True)
    atomic_write_text(output / "report.md", _markdown(results, drawn))
    atomic_write_text(output / "report.html", _html(results, radar if drawn else None))


def paper_shares(results: Mapping[str, Any]) -> dict[str, float]:
    """Ours divided by the paper's, of each task's own figure that both have; of those, more is
    better."""
    return {
        name: result["metrics"][main] * result["scale"] / result["figures"][main]["paper"]
        for name, result in results["tasks"].items()
        if (main := result["main"]) in result["metrics"] and main in result["figures"]
    }


def sections(results: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """The paper's tables with a column of ours: title and rows as `HEAD` names their cells."""
    for suite, title in TITLES.items():
        rows = [
            row
            for name, result in results["tasks"].items()
            if result["suite"] == suite
            for row in _rows(name, result)
        ]
        if rows:
            yield title, rows


def _rows(name: str, result: Mapping[str, Any]) -> Iterator[Row]:
    figures = result["figures"]
    metrics = result["metrics"]
    # The benchmark's own figure first, those that the paper has, then all others.
    names = dict.fromkeys([result["main"], *figures, *metrics])
    for number, metric in enumerate(n for n in names if not n.endswith(BLIND)):
        value, blind = metrics.get(metric), metrics.get(f"{metric}{BLIND}")
        paper = figures.get(metric, {}).get("paper")
        difference = None if value is None or paper is None else value * result["scale"] - paper
        yield (
            f"{result['title']} ({name})" if number == 0 else "",
            metric,
            f"{result['n']:,}" if number == 0 else "",
            "to be judged" if value is None else shown(value, result),
            "" if paper is None else f"{paper:g}",
            "" if difference is None else f"{difference:+.2f}",
            "" if blind is None else shown(blind, result),
            _remarks(result) if number == 0 else "",
        )


def _remarks(result: Mapping[str, Any]) -> str:
    limit = f"only the first {result['limit']} questions" if result["limit"] else ""
    broken = f"{result['broken']['n']} could not be asked" if result["broken"]["n"] else ""
    return "; ".join(filter(None, (limit, broken, result["note"])))


def _circumstances(results: Mapping[str, Any]) -> list[Row]:
    machine = results["machine"]
    first = next(iter(results["tasks"].values()))
    decoding, images = first["decoding"], first["preprocessing"]
    return [
        ("weights", results["fingerprint"][:16]),
        ("images", f"{images['size']} x {images['size']} pixels, {images['policy']}"),
        ("numbers", decoding["dtype"]),
        ("modality-adaptive module", "on" if decoding["mam"] else "off"),
        ("machine", f"{machine['name']}, {machine['processes']} processes"),
        ("versions", ", ".join(f"{name} {number}" for name, number in first["versions"].items())),
    ]


def _broken(results: Mapping[str, Any]) -> list[Row]:
    return [
        (name, item["id"], item["reason"])
        for name, result in results["tasks"].items()
        for item in result["broken"]["first"]
    ]


def _parts(results: Mapping[str, Any]) -> Iterator[tuple[str, Row, Sequence[Row]]]:
    """Title, head and rows of all tables."""
    for title, rows in sections(results):
        yield title, HEAD, rows
    if skipped := list(results["skipped"].items()):
        yield "Left out", ("benchmark", "why"), skipped
    if broken := _broken(results):
        yield "Could not be asked (the first ones)", ("benchmark", "sample", "why"), broken
    yield "How", ("", ""), _circumstances(results)


def _markdown(results: Mapping[str, Any], radar: bool) -> str:
    def line(cells: Row) -> str:
        return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"

    text = f"# {results['model']}\n"
    for title, head, rows in _parts(results):
        ruler = "|" + " --- |" * len(head)
        text += f"\n## {title}\n\n" + "\n".join([line(head), ruler, *map(line, rows)]) + "\n"
    return text + ("\n![Against the paper](radar.png)\n" if radar else "")


def _html(results: Mapping[str, Any], radar: Path | None) -> str:
    def line(cells: Row, cell: str) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in cells) + "</tr>"

    body = ""
    for title, head, rows in _parts(results):
        lines = "\n".join(line(row, "td") for row in rows)
        body += f"<h2>{escape(title)}</h2>\n<table><thead>{line(head, 'th')}</thead>\n"
        body += f"<tbody>\n{lines}\n</tbody></table>\n"
    if radar is not None:
        image = base64.b64encode(radar.read_bytes()).decode()
        body += f'<h2>Against the paper</h2>\n<img src="data:image/png;base64,{image}" alt="">\n'
    title = escape(results["model"])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n"
    )
