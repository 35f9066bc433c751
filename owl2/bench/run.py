"""A complete benchmark, from a preset or checkpoint to ``bench.json``.

::

    BenchModel ──► limits of the machine ──► cases, one by one ──► table
                                               OUTPUT/bench.json, bench.md, bench.png
"""

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from owl2 import __version__
from owl2.bench.cases import CASES
from owl2.bench.implementations import Implementations
from owl2.bench.measure import case_result, measure_case, measure_roofline
from owl2.bench.presets import BenchModel
from owl2.bench.report import markdown, plot, table
from owl2.bench.training import MeasurementError
from owl2.errors import ErrorCode, InputError, require_package
from owl2.files import atomic_write_text, require_writable
from owl2.registry import look_up

CPU_INFO = Path("/proc/cpuinfo")


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
    names = select_cases(cases)
    if output is not None:
        require_package("matplotlib", "The plot in --output", "plot")
        require_writable(output / "bench.json")
    results: dict[str, Any] = {"machine": {}, "cases": {}, "skipped": {}, "finished": False}
    try:
        _measure(source, names, repeats, results, console)
        results["finished"] = True
    except KeyboardInterrupt:
        console.print("stopped; the results so far:", style="dim")
    title = f"{source.title}: {results['machine'].get('title', '')}"
    if results["cases"]:
        console.print(table(results, title))
        if output is not None:
            atomic_write_text(output / "bench.json", json.dumps(results, indent=2) + "\n")
            atomic_write_text(output / "bench.md", markdown(results, title))
            plot(output / "bench.png", results, title)
            console.print(f"results in {output}/bench.*", markup=False, highlight=False)
    return results


def select_cases(cases: str | None) -> list[str]:
    """Names in `CASES`, in their order. Raises `InputError` for an unknown name, or for none."""
    if cases is None:
        return list(CASES)
    requested = {name.strip() for name in cases.split(",") if name.strip()}
    if not requested:
        raise InputError(
            "--cases: name at least one case, e.g. decode_1,prefill_1", ErrorCode.MISSING_VALUE
        )
    for name in sorted(requested):
        look_up("case", name, CASES)
    return [name for name in CASES if name in requested]


def _measure(
    source: BenchModel, names: list[str], repeats: int, results: dict[str, Any], console: Console
) -> None:
    """Fill `results`; a case appears after its first round."""
    with console.status("limits of the machine") as status:
        device, dtype = source.device_and_dtype()
        roofline = measure_roofline(device, dtype)
        results["machine"] = {
            "matmul_gflops": roofline.matmul / 1e9,
            "read_gb_s": roofline.read / 1e9,
            **environment(device, dtype),
        }
        status.update("loading the model")
        on = Implementations(source, roofline)
        for index, name in enumerate(names, 1):
            status.update(f"{name} ({index}/{len(names)})")
            if not console.is_terminal:
                console.print(f"{name} ...", style="dim", highlight=False)
            try:
                case = CASES[name](on)
                for costs in measure_case(case, repeats, device):
                    results["cases"][name] = case_result(case, costs)
            except (MeasurementError, torch.OutOfMemoryError) as error:
                results["skipped"][name] = reason = str(error).splitlines()[0]
                console.print(f"{name} skipped: {reason}", markup=False, highlight=False)


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
        "versions": {
            "owl2": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
