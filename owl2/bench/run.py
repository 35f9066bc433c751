"""A whole measurement, from a size or checkpoint to ``bench.json``.

::

    Origin ──► limits of the machine ──► figures, one after the other ──► table
                                                       OUTPUT/bench.json, bench.md, bench.png
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from owl2 import __version__
from owl2.bench.cases import FIGURES
from owl2.bench.implementations import Subjects
from owl2.bench.memory import NotMeasured
from owl2.bench.presets import Origin
from owl2.bench.report import draw, markdown, require_matplotlib, table
from owl2.bench.roofline import measure_limits
from owl2.bench.timing import measure, result
from owl2.errors import InputError
from owl2.files import atomic_write_text, require_writable
from owl2.registry import look_up

DEFAULT_SIZE = "bench"


@dataclass(frozen=True)
class Settings:
    """What `owl2 bench` was asked for.

    Attributes:
        model: a directory or a hub id, or `size`: a name.
        figures: names, separated by commas; None: all.
    """

    model: str | None = None
    size: str | None = None
    figures: str | None = None
    output: Path | None = None
    repeats: int = 7
    device: str | None = None
    dtype: str | None = None


def bench(settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, show and write; returns what is in ``bench.json``.

    What there is not enough memory for is left out, with the reason in ``left_out``. Ctrl-C ends it
    with what has been measured until then.

    Raises:
        InputError: no such figure, size, checkpoint, device or dtype; an `output` that cannot be
            written, or drawn as matplotlib is missing.
    """
    names = chosen_figures(settings.figures)
    if settings.model is not None and settings.size is not None:
        raise InputError("Give either --model or --size.")
    if settings.output is not None:
        require_matplotlib()
        require_writable(settings.output / "bench.json")
    origin = Origin(settings.model, settings.size or DEFAULT_SIZE, settings.device, settings.dtype)
    results: dict[str, Any] = {"machine": {}, "figures": {}, "left_out": {}, "finished": False}
    try:
        _measure_all(origin, names, settings.repeats, results, console)
        results["finished"] = True
    except KeyboardInterrupt:
        console.print("stopped; what follows was measured before", style="dim")
    title = f"{origin.title}: {results['machine'].get('title', '')}"
    if results["figures"]:
        console.print(table(results, title))
        if settings.output is not None:
            _write(settings.output, results, title, console)
    return results


def chosen_figures(figures: str | None) -> list[str]:
    """Names of `FIGURES`, in the order in which they are measured.

    Raises:
        InputError: for a name that is none, or no name at all.
    """
    if figures is None:
        return list(FIGURES)
    asked = {name.strip() for name in figures.split(",") if name.strip()}
    if not asked:
        raise InputError("figures: name at least one, such as decode_1,prefill_1")
    for name in sorted(asked):
        look_up("figure", name, FIGURES)
    return [name for name in FIGURES if name in asked]


def _measure_all(
    origin: Origin, names: list[str], repeats: int, results: dict[str, Any], console: Console
) -> None:
    """Fill `results`, a figure as soon as there is one round of it."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("the machine's limits", total=1 + len(names))
        device, dtype = origin.place()
        limits = measure_limits(device, dtype)
        results["machine"] = {**limits.as_json(), **circumstances(device, dtype)}
        progress.update(task, description="the model", advance=1)
        on = Subjects(origin, limits)
        for name in names:
            progress.update(task, description=name)
            if not console.is_terminal:
                console.print(f"{name} ...", style="dim", highlight=False)
            try:
                figure = FIGURES[name](on)
                for costs in measure(figure, repeats, device):
                    results["figures"][name] = result(figure, costs)
            except (NotMeasured, torch.OutOfMemoryError) as error:
                results["left_out"][name] = why = str(error).splitlines()[0]
                console.print(f"{name} is left out: {why}", markup=False, highlight=False)
            progress.advance(task)


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What else has to be the same for the same figures."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads of {_processor()}"
    kind = str(dtype).removeprefix("torch.")
    return {
        "title": f"{kind} on {name}",
        "device": str(device),
        "dtype": kind,
        "threads": torch.get_num_threads(),
        "versions": {
            "owl2": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _processor() -> str:
    """Its name, where Linux tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write(output: Path, results: dict[str, Any], title: str, console: Console) -> None:
    atomic_write_text(output / "bench.json", json.dumps(results, indent=2) + "\n")
    atomic_write_text(output / "bench.md", markdown(results, title))
    draw(output / "bench.png", results, title)
    where = ", ".join(str(output / f"bench.{kind}") for kind in ("json", "md", "png"))
    console.print(where, markup=False, highlight=False, soft_wrap=True)
