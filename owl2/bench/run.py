"""A complete benchmark, from a preset or checkpoint to ``bench.json`` or ``scaling.json``.

::

    BenchModel ──► limits of the machine ──► cases or curves, one by one ──► tables
                                               OUTPUT/bench.json, bench.md, bench.png
                                               OUTPUT/scaling.json, scaling.md, scaling_*.png
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status

from owl2 import __version__
from owl2.bench import report
from owl2.bench.cases import CASES
from owl2.bench.implementations import Implementations
from owl2.bench.measure import Roofline, case_result, measure_case, measure_roofline
from owl2.bench.presets import PRESETS, BenchModel
from owl2.bench.scaling import CURVES, DEFAULT_SIZES, measure_curves
from owl2.bench.training import MeasurementError
from owl2.errors import ErrorCode, InputError, require_package
from owl2.files import atomic_write_json, atomic_write_text, require_writable
from owl2.registry import look_up
from owl2.runtime import package_versions

CPU_INFO = Path("/proc/cpuinfo")

Measure = Callable[[Roofline, Callable[[str], None]], None]  # limits; reports the progress


@dataclass(frozen=True)
class Output:
    """The files of a benchmark.

    Attributes:
        stem: The name of the files.
        key: The key of the measurements in the JSON file.
        sheets, figures: Make tables, and plots by the suffix of their file, from the results.
    """

    stem: str
    key: str
    sheets: Callable[[Mapping[str, Any]], list[report.Sheet]]
    figures: Callable[[Mapping[str, Any], str], Mapping[str, Any]]


BENCH = Output("bench", "cases", report.case_sheets, report.case_figures)
SCALING = Output("scaling", "curves", report.curve_sheets, report.curve_figures)


def bench(
    source: BenchModel,
    console: Console,
    *,
    cases: str | None = None,
    output: Path | None = None,
    repeats: int = 7,
) -> dict[str, Any]:
    """Measure, print and write; returns the content of ``bench.json``.

    Cases that do not fit into memory are listed in ``skipped`` with the reason. Ctrl-C stops the
    benchmark; the results so far are printed and written.

    Args:
        cases: Names in `CASES`, separated by commas; None: all.
        output: Directory for ``bench.json``, ``bench.md`` and ``bench.png``.
        repeats: Rounds per case.

    Raises:
        InputError: Unknown case, size, checkpoint, device or dtype; an `output` that cannot be
            written; matplotlib is missing.
    """
    names = select("case", "--cases", cases, CASES)
    results = _new_results(BENCH, output)

    def measure(roofline: Roofline, progress: Callable[[str], None]) -> None:
        progress("loading the model")
        impls = Implementations(source, roofline)
        for index, name in enumerate(names, 1):
            progress(f"{name} ({index}/{len(names)})")
            try:
                case = CASES[name](impls)
                for costs in measure_case(case, repeats, impls.model.device):
                    results["cases"][name] = case_result(case, costs)
            except (MeasurementError, torch.OutOfMemoryError) as error:
                results["skipped"][name] = str(error).splitlines()[0]

    return _run(BENCH, source, measure, results, output, console)


def bench_scaling(
    source: BenchModel,
    console: Console,
    *,
    cases: str | None = None,
    sizes: str | None = None,
    output: Path | None = None,
    repeats: int = 7,
) -> dict[str, Any]:
    """Measure curves, print and write; returns the content of ``scaling.json``.

    Points that do not fit into memory or time are listed in ``skipped`` with the reason. Ctrl-C
    stops the benchmark; the results so far are printed and written.

    Args:
        source: The model of all curves except `sizes`.
        cases: Names in `CURVES`, separated by commas; None: all.
        sizes: Names in `PRESETS`, separated by commas; None: `DEFAULT_SIZES`.
        output: Directory for ``scaling.json``, ``scaling.md`` and a plot per curve.
        repeats: Rounds per point.

    Raises:
        InputError: As `bench`.
    """
    names = select("curve", "--cases", cases, CURVES)
    selected = DEFAULT_SIZES if sizes is None else select("size", "--sizes", sizes, PRESETS)
    results = _new_results(SCALING, output)

    def measure(roofline: Roofline, progress: Callable[[str], None]) -> None:
        measure_curves(source, names, selected, repeats, roofline, results, progress)

    return _run(SCALING, source, measure, results, output, console)


def select(kind: str, option: str, value: str | None, table: Mapping[str, Any]) -> list[str]:
    """The names of a comma-separated list, in the order of `table`; None: all.

    Raises:
        InputError: An unknown name, or no name.
    """
    if value is None:
        return list(table)
    requested = {name.strip() for name in value.split(",") if name.strip()}
    if not requested:
        raise InputError(
            f"{option}: name at least one {kind}, e.g. {next(iter(table))}",
            ErrorCode.MISSING_VALUE,
        )
    for name in sorted(requested):
        look_up(kind, name, table)
    return [name for name in table if name in requested]


def _new_results(kind: Output, output: Path | None) -> dict[str, Any]:
    """Empty results. Raises `InputError` if they could not be written."""
    if output is not None:
        require_package("matplotlib", "The plot in --output", "plot")
        require_writable(output / f"{kind.stem}.json")
    return {"machine": {}, kind.key: {}, "skipped": {}, "finished": False}


def _run(
    kind: Output,
    source: BenchModel,
    measure: Measure,
    results: dict[str, Any],
    output: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Call `measure`, which fills the results, then print and write them."""
    try:
        with console.status("limits of the machine") as status:
            device, dtype = source.device_and_dtype()
            roofline = measure_roofline(device, dtype)
            results["machine"] = {
                "matmul_gflops": roofline.matmul / 1e9,
                "read_gb_s": roofline.read / 1e9,
                **environment(device, dtype),
            }
            measure(roofline, lambda text: _show_progress(text, status, console))
        results["finished"] = True
    except KeyboardInterrupt:
        console.print("stopped; the results so far:", style="dim")
    for name, reason in results["skipped"].items():
        console.print(f"{name} skipped: {reason}", markup=False, highlight=False)
    if results[kind.key]:
        _write(kind, f"{source.title}: {results['machine']['title']}", results, output, console)
    return results


def _show_progress(text: str, status: Status, console: Console) -> None:
    status.update(text)
    if not console.is_terminal:
        console.print(f"{text} ...", style="dim", markup=False, highlight=False)


def _write(
    kind: Output, title: str, results: dict[str, Any], output: Path | None, console: Console
) -> None:
    """Print the tables; with `output`, write all files."""
    sheets, caption = kind.sheets(results), report.limits(results["machine"])
    for sheet in sheets:
        console.print(report.table(sheet, title, caption))
    if output is None:
        return
    path = output / kind.stem
    atomic_write_json(path.with_suffix(".json"), results)
    atomic_write_text(path.with_suffix(".md"), report.markdown(sheets, title, caption))
    for suffix, figure in kind.figures(results, f"{title}\n{caption}").items():
        figure.savefig(output / f"{kind.stem}{suffix}.png", dpi=130)
    console.print(f"results in {path}.*", markup=False, highlight=False)


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The hardware and the versions that the results depend on."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{threads} threads of {models[0] if models else platform.machine()}"
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "title": f"{dtype_name} on {name}",
        "device": str(device),
        "dtype": dtype_name,
        "threads": threads,
        "versions": {"owl2": __version__, **package_versions("torch", "transformers")},
    }
