"""The report of a benchmark: tables for the terminal and for Markdown, and plots."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from owl2.bench.measure import STANDARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CASE_COLUMNS = ("case", "unit", *STANDARD, "ratio", "limit", "spread")
COLORS = {"baseline": "0.75", "owl2": "tab:blue", "llama": "tab:orange"}


class Sheet(NamedTuple):
    """A table of texts; the first `text_columns` columns are aligned to the left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    title: str | None = None


def case_sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """One table of all cases."""
    return [Sheet(CASE_COLUMNS, [*_case_rows(results)], text_columns=2)]


def _case_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row per case, and one per implementation without a column."""
    for name, case in results["cases"].items():
        yield (
            name,
            case["unit"],
            *(_format(case[key]) for key in STANDARD),
            f"{case['ratio']:.2f}",
            _percent(case["roofline_fraction"]),
            f"±{_spread(case):.0%}",
        )
        for key in case["spread"]:
            if key not in STANDARD:
                ratio = f"{case[f'vs_{key}']:.2f}"
                yield (f"  {key}: {_format(case[key])}", "", "", "", "", ratio, "", "")


def curve_sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """A table per curve: each series with its fraction of the limit."""
    sheets = []
    for name, curve in results["curves"].items():
        columns: list[str] = [name]
        rows = []
        for point in curve["points"]:
            cases = point["cases"]
            columns = [name]
            row = [point["label"]]
            for series, case in cases.items():
                columns += [f"{series}, {case['unit']}", "limit"]
                row += [_format(case["owl2"]), _percent(case["roofline_fraction"])]
            columns.append("spread")
            rows.append([*row, f"±{max(map(_spread, cases.values())):.0%}"])
        sheets.append(Sheet(columns, rows, title=f"{name}: {curve['title']}"))
    return sheets


def _spread(case: Mapping[str, Any]) -> float:
    """Half the range of the implementation with the largest range, relative to its median."""
    return max((high - low) / 2 / case[key] for key, (low, high) in case["spread"].items())


def _format(value: float | None) -> str:
    """About three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"


def table(sheet: Sheet, title: str, caption: str) -> Table:
    """The table for the terminal; it fits into 80 columns."""
    table = Table(
        title=sheet.title or title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(sheet.columns):
        is_text = index < sheet.text_columns
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*row)
    return table


def markdown(sheets: Sequence[Sheet], title: str, caption: str) -> str:
    """The same tables in Markdown."""
    lines = [f"**{title}**; {caption}"]
    for columns, rows, text_columns, heading in sheets:
        ruler = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
        lines += ["", heading, ""] if heading else [""]
        lines += ["| " + " | ".join(cells) + " |" for cells in (columns, ruler, *rows)]
    return "\n".join(lines) + "\n"


def limits(machine: Mapping[str, Any]) -> str:
    """The limits of the machine in one line."""
    matmul, read = machine["matmul_gflops"], machine["read_gb_s"]
    return f"matrix product {matmul:,.0f} GFLOP/s, memory read {read:,.1f} GB/s"


def case_figures(results: Mapping[str, Any], heading: str) -> dict[str, "Figure"]:
    """One chart per case: a bar per implementation, with a line from minimum to maximum."""
    cases = results["cases"]
    columns = min(4, len(cases))
    figure, grid = _subplots(-(-len(cases) // columns), columns, (3.4, 1.9), heading)
    for axes in grid[len(cases) :]:
        axes.set_axis_off()
    for axes, (name, case) in zip(grid, cases.items(), strict=False):
        values = {key: case[key] for key in case["spread"]}
        errors = [_error(case, key) for key in values]
        colors = [COLORS.get(key, "tab:green") for key in values]
        style: dict[str, Any] = {"color": colors, "error_kw": {"lw": 1, "capsize": 2}}
        axes.barh([*values], [*values.values()], xerr=[*zip(*errors, strict=True)], **style)
        axes.invert_yaxis()
        axes.set_title(f"{name}, {case['unit']} (ratio {case['ratio']:.2f})", fontsize=8)
    return {"": figure}


def curve_figures(results: Mapping[str, Any], heading: str) -> dict[str, "Figure"]:
    """A plot per curve: one chart per series, with the limit of the machine as a dashed line."""
    from matplotlib.ticker import LogLocator

    figures = {}
    for name, curve in results["curves"].items():
        points = curve["points"]
        if not points:
            continue
        x = [point["x"] for point in points]
        figure, grid = _subplots(1, len(points[0]["cases"]), (4.2, 3.0), heading)
        for axes, series in zip(grid, points[0]["cases"], strict=True):
            cases = [point["cases"][series] for point in points]
            y = [case["owl2"] for case in cases]
            errors = [*zip(*(_error(case, "owl2") for case in cases), strict=True)]
            axes.errorbar(x, y, yerr=errors, marker="o", capsize=2, color=COLORS["owl2"])
            limits = [
                case["owl2"] * case["roofline_fraction"] ** (1 if case["unit"] == "ms" else -1)
                for case in cases
            ]
            axes.plot(x, limits, linestyle="--", color="0.5", label="limit of the machine")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            # Plain numbers, also between powers of ten: a curve can be within one.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_xticks(x, [point["label"] for point in points])
            axes.set_xlabel(curve["title"], fontsize=8)
            axes.set_title(f"{series}, {cases[0]['unit']}", fontsize=8)
            axes.legend(fontsize=7)
        figures[f"_{name}"] = figure
    return figures


def _subplots(
    lines: int, columns: int, size: tuple[float, float], heading: str
) -> tuple["Figure", list["Axes"]]:
    """A figure with a grid of charts, each of `size` inches."""
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width * columns, 0.9 + height * lines), layout="constrained")
    figure.suptitle(heading, fontsize=9)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid)


def _error(case: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Distances from the median to the minimum and to the maximum."""
    low, high = case["spread"][name]
    return max(0.0, case[name] - low), max(0.0, high - case[name])
