"""Tables and figures of a study, drawn from its results file alone.

::

    python recipes/study/report.py docs/study/results.json --output docs/study
    python recipes/study/report.py recipes/study/study.yaml --power  # before the first run
    python recipes/study/report.py docs/study/results.json --document docs/study.md

``report.md`` has the scores of each arm, the paired differences from the baseline arm with 95 %
intervals, and the scores by category of the questions. ``differences.svg``, ``attention.svg`` and
``distances.svg`` are drawn if the results have their values. `--document` replaces the part of a
document between ``<!-- results -->`` and ``<!-- end of results -->`` by the tables and the figures.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import draw_figures
from study import read_study
from tables import (
    Json,
    agreement_table,
    category_table,
    clear_differences,
    difference_table,
    finished_arms,
    main_disagreements,
    power_table,
    score_table,
    title_of,
)

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def read_results(path: Path) -> Json:
    """The content of a results file, or of a study (.yaml) before its first run.

    Raises:
        InputError: It is not one.
    """
    if path.suffix in (".yaml", ".yml"):
        return {"settings": read_study(path).model_dump(), "cells": []}
    results = json.loads(path.read_text("utf-8"))
    if not isinstance(results, dict) or not {"settings", "cells"} <= results.keys():
        raise InputError(f"{path} is not a results file of a study", ErrorCode.INVALID_FORMAT)
    return results


def report(results: Json, figures: Sequence[str], folder: str = "") -> str:
    """The tables and the figures in Markdown; `folder` is the prefix of the figures' paths."""
    settings = results["settings"]
    total = sum(
        settings["main_seeds" if arm in settings["main"] else "seeds"] for arm in settings["arms"]
    )
    machines = sorted(
        {f"{c['machine']['processor']}, {c['machine']['cores']} cores" for c in results["cells"]}
    )
    hours = sum(sum(cell["seconds"].values()) for cell in results["cells"]) / 3600
    count = f"{len(results['cells'])} of {total} runs are finished"
    if not results["cells"]:
        return f"{count}.\n"
    finished = finished_arms(results)
    others = [title_of(results, arm) for arm in settings["arms"] if arm not in finished]
    lines = [
        f"{count} ({', '.join(machines)}; {hours:.1f} hours).",
        "",
        *([f"Not run yet: {'; '.join(others)}.", ""] if others else []),
        "Scores, mean ± half width of the 95 % interval over the seeds:",
        "",
        score_table(results),
        f"Paired differences from “{title_of(results, settings['baseline'])}”, 95 % intervals:",
        "",
        difference_table(results),
        *_corrected(results),
        *_by_category(results),
        *(f"![{Path(name).stem}]({folder}{name})\n" for name in figures),
    ]
    return "\n".join(lines)


def _corrected(results: Json) -> list[str]:
    lines = clear_differences(results)
    return ["Differences that remain after Holm's correction:", "", *lines, ""] if lines else []


def _by_category(results: Json) -> list[str]:
    table = category_table(results)
    return (
        ["Scores by category of the questions, as in the first table:", "", table] if table else []
    )


def replace_part(document: str, text: str) -> str:
    """The document with `text` between `BEGIN` and `END`.

    Raises:
        InputError: The document does not contain both.
    """
    if BEGIN not in document or END not in document:
        raise InputError(f"the document has no {BEGIN} and {END}", ErrorCode.INVALID_FORMAT)
    before, rest = document.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    """Run the command; returns its exit code: with `--compare`, 1 if a main result disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="results file, or a study (.yaml)")
    parser.add_argument("--output", type=Path, help="directory; default: that of the results")
    parser.add_argument("--power", action="store_true", help="only print the power of the study")
    parser.add_argument("--compare", type=Path, help="only compare with these results")
    parser.add_argument("--document", type=Path, help="Markdown file that receives the tables")
    given = parser.parse_args()
    try:
        results = read_results(given.results)
        if given.power:
            print(power_table(results))
            return 0
        if given.compare is not None:
            other = read_results(given.compare)
            print(agreement_table(results, other))
            if disagreeing := main_disagreements(results, other):
                print(f"Intervals that do not overlap: {'; '.join(disagreeing)}", file=sys.stderr)
            return 1 if disagreeing else 0
        output = given.output or given.results.parent
        output.mkdir(parents=True, exist_ok=True)
        figures = draw_figures(results, output)
        atomic_write_text(output / "report.md", report(results, figures))
        if given.document is not None:
            text = report(results, figures, f"{os.path.relpath(output, given.document.parent)}/")
            document = given.document.read_text("utf-8")
            atomic_write_text(given.document, replace_part(document, text))
        print(f"{output}: report.md {' '.join(figures)}")
    except (InputError, OSError, json.JSONDecodeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
