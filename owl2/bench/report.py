"""What was measured, for people: a table on the terminal, the same in Markdown, and an image."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from owl2.errors import InputError

COLUMNS = ("figure", "unit", "textbook", "owl2", "llama", "ratio", "limit", "spread")
COLOURS = {"textbook": "0.75", "owl2": "tab:blue", "llama": "tab:orange"}


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `COLUMNS`: for each figure one, and one for each further implementation."""
    for name, figure in results["figures"].items():
        share = figure["limit_share"]
        yield (
            name,
            figure["unit"],
            *(_short(figure[who]) for who in ("textbook", "owl2", "llama")),
            f"{figure['ratio']:.2f}",
            "–" if share is None else f"{share:.0%}",
            f"±{max(_spread(figure, who) for who in figure['spread']):.0%}",
        )
        for who in figure["spread"]:
            if who not in COLOURS:
                times = f"{figure[f'against_{who}']:.2f}"
                yield (f"  {who}: {_short(figure[who])}", "", "", "", "", times, "", "")


def table(results: Mapping[str, Any], title: str) -> Table:
    """For the terminal."""
    shown = Table(
        title=title,
        title_justify="left",
        caption=limits(results["machine"]),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # it is to fit into 80 columns
    )
    for number, column in enumerate(COLUMNS):
        justify: Any = "right" if number >= 2 else "left"
        shown.add_column(column, justify=justify, no_wrap=True)
    for row in rows(results):
        shown.add_row(*row)
    return shown


def markdown(results: Mapping[str, Any], title: str) -> str:
    """The same as a page's table."""
    ruler = ["---", "---", *["---:"] * 6]
    lines = [f"**{title}**; {limits(results['machine'])}", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ruler, *rows(results))]
    return "\n".join(lines) + "\n"


def limits(machine: Mapping[str, Any]) -> str:
    """The machine's limits in one line."""
    return (
        f"matrix product {machine['matmul_gflops']:,.0f} GFLOP/s, matrix-vector "
        f"{machine['matvec_gb_s']:,.1f} GB/s, memory read {machine['read_gb_s']:,.1f} GB/s"
    )


def require_matplotlib() -> None:
    """Refuse to begin what could not be drawn.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--output draws an image, which needs matplotlib: pip install 'owl2-vlm[plot]'"
        )


def draw(path: Path, results: Mapping[str, Any], title: str) -> None:
    """For each figure a small chart: a bar an implementation, a line from smallest to largest."""
    from matplotlib.figure import Figure

    figures = results["figures"]
    columns = min(4, len(figures))
    lines = -(-len(figures) // columns)
    image = Figure(figsize=(3.4 * columns, 0.9 + 1.9 * lines), layout="constrained")
    image.suptitle(f"{title}\n{limits(results['machine'])}", fontsize=9)
    grid = image.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(figures) :]:
        axes.set_axis_off()
    for axes, (name, figure) in zip(grid, figures.items(), strict=False):
        names = list(figure["spread"])
        values = [figure[who] for who in names]
        spread = list(zip(*figure["spread"].values(), strict=True))
        errors = [
            [max(0.0, value - low) for value, low in zip(values, spread[0], strict=True)],
            [max(0.0, high - value) for value, high in zip(values, spread[1], strict=True)],
        ]
        colours = [COLOURS.get(who, "tab:green") for who in names]
        axes.barh(names, values, xerr=errors, color=colours, error_kw={"lw": 1, "capsize": 2})
        axes.invert_yaxis()
        axes.set_title(f"{name}, {figure['unit']} (ratio {figure['ratio']:.2f})", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    image.savefig(path, dpi=130)


def _spread(figure: Mapping[str, Any], who: str) -> float:
    """Half of the way from the smallest to the largest, as a share of the median."""
    low, high = figure["spread"][who]
    return (high - low) / 2 / figure[who]


def _short(value: float | None) -> str:
    """Three digits or so; a dash for what is not there."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
