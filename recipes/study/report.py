"""Tables and figures of a study, drawn from its results file alone.

::

    python recipes/study/report.py docs/study/results.json --output docs/study
    python recipes/study/report.py recipes/study/study.yaml --power  # before the first run
    python recipes/study/report.py docs/study/results.json --document docs/study.md

``report.md`` has the scores of each arm and the paired differences from the baseline arm, with
95 % intervals. ``differences.svg``, ``attention.svg`` and ``distances.svg`` are drawn if the
results have their values. `--document` replaces the part of a document between
``<!-- results -->`` and ``<!-- end of results -->`` by the tables and the figures.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paired import PairedDifference, detectable_difference, interval, paired_difference
from study import read_study

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text
from owl2.fonts import save_figure

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
NOT_RUN = "not run"
Scores = dict[str, dict[str, dict[int, float]]]  # metric, arm, seed
Json = dict[str, Any]


def scores_of(results: Json) -> Scores:
    """The scores by metric, arm and seed.

    ``log_perplexity`` is derived from ``perplexity``: differences of its logarithm are relative
    ones. ``choice, text K and V`` and ``exact, text K and V`` are those after replacing the visual
    keys and values.
    """
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for cell in results["cells"]:
        metrics = dict(cell["metrics"])
        if "perplexity" in metrics:
            metrics["log_perplexity"] = math.log(metrics["perplexity"])
        replaced = cell.get("replaced", {})
        metrics |= {f"{name}, text K and V": value for name, value in replaced.items()}
        for name, value in metrics.items():
            scores[name][cell["arm"]][cell["seed"]] = value
    return scores


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


# ------------------------------------------------------------------ tables


def score_table(results: Json) -> str:
    """Mean and half width of the 95 % interval of each score of each arm, in Markdown."""
    scores, arms = scores_of(results), results["settings"]["arms"]
    names = [name for name in scores if name != "log_perplexity"]
    rows = []
    start = (results.get("start") or {}).get("metrics", {})
    if start:
        rows.append(["before stage 2", "1", *(_number(start.get(name)) for name in names)])
    for arm in arms:
        by_metric = [scores[name].get(arm, {}) for name in names]
        runs = max(map(len, by_metric), default=0)
        cells = [_mean(list(values.values())) if values else NOT_RUN for values in by_metric]
        rows.append([title_of(results, arm), str(runs), *cells])
    return markdown_table(["arm", "runs", *names], rows)


def difference_table(results: Json) -> str:
    """The paired difference of each arm from the baseline for each score, in Markdown."""
    found = dict(differences(results))
    names = sorted(
        {name for values in found.values() for name in values}, key=list(scores_of(results)).index
    )
    rows = []
    for arm, values in found.items():
        pairs = max((value.count for value in values.values()), default=0)
        cells = [_difference(values.get(name)) for name in names]
        rows.append([title_of(results, arm), str(pairs), *cells])
    return markdown_table(["arm", "pairs", *names], rows)


def power_table(results: Json) -> str:
    """The smallest difference that is found with a probability of 80 %, in Markdown.

    For the assumed standard deviation, which is stated in the study, and the observed one.
    """
    settings = results["settings"]
    main, others = settings["main_seeds"], settings["seeds"]
    counts = sorted(
        {count for count in (others, main if settings["main"] else others) if count > 1}
    )
    rows = []
    observed = observed_sds(results)
    for name, sd in settings["expected_sd"].items():
        cells = [f"{detectable_difference(sd, count):.3f}" for count in counts]
        rows.append([name, f"{sd:g}", *cells, _number(observed.get(name))])
    heads = [f"detectable, {count} pairs" for count in counts]
    return markdown_table(["score", "assumed SD", *heads, "observed SD"], rows)


def agreement_table(results: Json, other: Json) -> str:
    """The differences of two studies, and whether the first one's interval admits the other's sign.

    In Markdown, for the arms and the scores that both have.
    """
    rows, found = [], dict(differences(other))
    for arm, values in differences(results):
        for name, value in values.items():
            if (reference := found.get(arm, {}).get(name)) is not None:
                rows.append(
                    [
                        f"{title_of(results, arm)}, {name}",
                        _difference(value),
                        _difference(reference),
                        "yes" if admits_sign(value, reference.mean) else "no",
                    ]
                )
    return markdown_table(["arm, score", results["study"], other["study"], "sign agrees"], rows)


def admits_sign(difference: PairedDifference, reference: float) -> bool:
    """Whether an interval, or the mean of one pair, admits the sign of a reference."""
    if math.isnan(difference.low):
        return difference.mean * reference >= 0
    return difference.high >= 0 if reference >= 0 else difference.low <= 0


def observed_sds(results: Json) -> dict[str, float]:
    """The standard deviation of the paired difference of each score, the median over the arms."""
    by_metric = defaultdict(list)
    for _, values in differences(results):
        for name, value in values.items():
            if value.count > 2:
                by_metric[name].append(value.sd)
    return {name: statistics.median(sds) for name, sds in by_metric.items()}


def differences(results: Json) -> Iterator[tuple[str, dict[str, PairedDifference]]]:
    """For each arm but the baseline, the difference from the baseline in each score."""
    settings, scores = results["settings"], scores_of(results)
    for arm in settings["arms"]:
        if arm != settings["baseline"]:
            found = {}
            for name, by_arm in scores.items():
                value = paired_difference(by_arm.get(arm, {}), by_arm.get(settings["baseline"], {}))
                if value is not None:
                    found[name] = value
            yield arm, found


def title_of(results: Json, arm: str) -> str:
    """The title of an arm."""
    return str(results["settings"]["arms"][arm]["title"] or arm)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> str:
    mean, half_width, _ = interval(values)
    return f"{mean:.3f}" + ("" if math.isnan(half_width) else f" ± {half_width:.3f}")


def _difference(value: PairedDifference | None) -> str:
    if value is None:
        return NOT_RUN
    text = f"{value.mean:+.3f}"
    return text if math.isnan(value.low) else f"{text} ({value.low:+.3f} to {value.high:+.3f})"


# ------------------------------------------------------------------ figures


def draw_figures(results: Json, output: Path) -> list[str]:
    """Draw the figures that the results have values for; returns the names of the files."""
    figures = {
        "differences.svg": _draw_differences,
        "attention.svg": _draw_attention,
        "distances.svg": _draw_distances,
    }
    drawn = []
    for name, draw in figures.items():
        figure = draw(results)
        if figure is not None:
            save_figure(figure, output / name, dpi=120)
            drawn.append(name)
    return drawn


def _draw_differences(results: Json) -> Any:
    """One panel per score: the paired difference of each arm with its interval."""
    from matplotlib.figure import Figure

    found = {arm: values for arm, values in differences(results) if values}
    names = [
        name for name in scores_of(results) if any(name in values for values in found.values())
    ]
    if not names:
        return None
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    height = rows * (0.9 + 0.3 * len(found))
    figure = Figure(figsize=(2.6 * columns + 1.5, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        for row, values in enumerate(found.values()):
            if (value := values.get(name)) is None:
                continue
            error = 0 if math.isnan(value.low) else value.high - value.mean
            panel.errorbar(value.mean, row, xerr=error, fmt="o", color="tab:blue", capsize=3)
        panel.axvline(0, color="0.6", linewidth=1)
        panel.set_title(name, fontsize="medium")
        panel.set_yticks(range(len(found)), [title_of(results, arm) for arm in found])
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize="small")
        panel.locator_params(axis="x", nbins=4)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    baseline = title_of(results, results["settings"]["baseline"])
    figure.suptitle(f"Difference from “{baseline}”, mean and 95 % interval over seeds")
    return figure


def layer_curves(results: Json, *keys: str) -> dict[str, list[tuple[float, float]]]:
    """Mean and half width of the interval of a value in `where`, by arm and layer."""
    by_arm = defaultdict(list)
    for cell in results["cells"]:
        value = cell.get("where")
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            by_arm[cell["arm"]].append(value)
    return {
        arm: [interval(layer)[:2] for layer in zip(*values, strict=True)]
        for arm, values in by_arm.items()
    }


def _draw_curves(results: Json, panels: Mapping[str, dict[str, Any]], label: str) -> Any:
    from matplotlib.figure import Figure

    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        for arm, points in curves.items():
            means = [mean for mean, _ in points]
            widths = [0.0 if math.isnan(width) else width for _, width in points]
            color = f"C{list(results['settings']['arms']).index(arm)}"  # the same in all panels
            panel.plot(means, color=color, label=title_of(results, arm))
            low = [m - w for m, w in zip(means, widths, strict=True)]
            high = [m + w for m, w in zip(means, widths, strict=True)]
            panel.fill_between(range(len(means)), low, high, color=color, alpha=0.2)
        panel.set(title=title, xlabel="layer")
        panel.set_ylim(bottom=0)
    axes[0].set_ylabel(label)
    axes[0].legend(fontsize="small", frameon=False)
    return figure


def _draw_attention(results: Json) -> Any:
    panels = {
        "image": layer_curves(results, "attention", "image"),
        "text of the prompt": layer_curves(results, "attention", "text"),
        "image, with text weights": layer_curves(results, "attention_text_weights", "image"),
    }
    return _draw_curves(results, panels, "share of the attention of the answer")


def _draw_distances(results: Json) -> Any:
    names = {
        name: None
        for cell in results["cells"]
        for name in (cell.get("where") or {}).get("distance", {})
    }
    panels = {name: layer_curves(results, "distance", name) for name in names}
    return _draw_curves(results, panels, "|visual − text| / |text|")


# ------------------------------------------------------------------ report


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
    lines = [
        f"{len(results['cells'])} of {total} runs are finished"
        + (f" ({', '.join(machines)}; {hours:.1f} hours)." if results["cells"] else "."),
        "",
        "Scores, mean ± half width of the 95 % interval over the seeds:",
        "",
        score_table(results),
        f"Paired differences from “{title_of(results, settings['baseline'])}”, 95 % intervals:",
        "",
        difference_table(results),
        *(f"![{Path(name).stem}]({folder}{name})\n" for name in figures),
    ]
    return "\n".join(lines)


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
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="results file, or a study (.yaml)")
    parser.add_argument("--output", type=Path, help="directory; default: that of the results")
    parser.add_argument("--power", action="store_true", help="only print the power of the study")
    parser.add_argument("--compare", type=Path, help="only compare the signs with these results")
    parser.add_argument("--document", type=Path, help="Markdown file that receives the tables")
    given = parser.parse_args()
    try:
        results = read_results(given.results)
        if given.power:
            print(power_table(results))
            return 0
        if given.compare is not None:
            print(agreement_table(results, read_results(given.compare)))
            return 0
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
