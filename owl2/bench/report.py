"""The report of a benchmark: a table for the terminal and for Markdown, and a plot."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from owl2.bench.measure import STANDARD

COLUMNS = ("case", "unit", *STANDARD, "ratio", "limit", "spread")
COLORS = {"baseline": "0.75", "owl2": "tab:blue", "llama": "tab:orange"}


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `COLUMNS`: one per case, and one per implementation without a column."""
    for name, case in results["cases"].items():
        fraction = case["roofline_fraction"]
        spreads = [(high - low) / 2 / case[key] for key, (low, high) in case["spread"].items()]
        yield (
            name,
            case["unit"],
            *(_format(case[key]) for key in STANDARD),
            f"{case['ratio']:.2f}",
            "–" if fraction is None else f"{fraction:.0%}",
            f"±{max(spreads):.0%}",
        )
        for key in case["spread"]:
            if key not in STANDARD:
                ratio = f"{case[f'vs_{key}']:.2f}"
                yield (f"  {key}: {_format(case[key])}", "", "", "", "", ratio, "", "")


def _format(value: float | None) -> str:
    """About three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(results: Mapping[str, Any], title: str) -> Table:
    """The table for the terminal; it fits into 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        caption=limits(results["machine"]),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index >= 2 else "left", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: Mapping[str, Any], title: str) -> str:
    """The same table in Markdown."""
    ruler = ["---", "---", *["---:"] * 6]
    lines = [f"**{title}**; {limits(results['machine'])}", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ruler, *rows(results))]
    return "\n".join(lines) + "\n"


def limits(machine: Mapping[str, Any]) -> str:
    """The limits of the machine in one line."""
    matmul, read = machine["matmul_gflops"], machine["read_gb_s"]
    return f"matrix product {matmul:,.0f} GFLOP/s, memory read {read:,.1f} GB/s"


def plot(path: Path, results: Mapping[str, Any], title: str) -> None:
    """Draw one chart per case: a bar per implementation, with a line from minimum to maximum."""
    from matplotlib.figure import Figure

    cases = results["cases"]
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.9 + 1.9 * lines), layout="constrained")
    figure.suptitle(f"{title}\n{limits(results['machine'])}", fontsize=9)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(cases) :]:
        axes.set_axis_off()
    for axes, (name, case) in zip(grid, cases.items(), strict=False):
        values = {key: case[key] for key in case["spread"]}
        errors = [
            (max(0.0, values[key] - low), max(0.0, high - values[key]))
            for key, (low, high) in case["spread"].items()
        ]
        colors = [COLORS.get(key, "tab:green") for key in values]
        style = {"color": colors, "error_kw": {"lw": 1, "capsize": 2}}
        axes.barh([*values], [*values.values()], xerr=[*zip(*errors, strict=True)], **style)
        axes.invert_yaxis()
        axes.set_title(f"{name}, {case['unit']} (ratio {case['ratio']:.2f})", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
