"""The figures of `report.py`."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paired import interval
from tables import Json, differences, scores_of, title_of

from owl2.fonts import save_figure


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
    """One panel per score: the paired difference of each arm with its interval.

    A circle is the difference of one pair, which has no interval.
    """
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
            is_single = math.isnan(value.low)
            error = None if is_single else value.high - value.mean
            marker = {"markerfacecolor": "none"} if is_single else {}
            panel.errorbar(
                value.mean, row, xerr=error, fmt="o", color="tab:blue", capsize=3, **marker
            )
        panel.axvline(0, color="0.6", linewidth=1)
        panel.set_title(name, fontsize="medium")
        panel.set_yticks(range(len(found)), [title_of(results, arm) for arm in found])
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize="small")
        panel.locator_params(axis="x", nbins=4)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    baseline = title_of(results, results["settings"]["baseline"])
    figure.suptitle(
        f"Difference from “{baseline}”, mean and 95 % interval over seeds (circle: one seed)"
    )
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
