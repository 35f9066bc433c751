"""The report of a finished run: ``loss.png``, ``run.json`` and a summary on the terminal."""

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from owl2 import __version__
from owl2.files import atomic_write_text
from owl2.train.checkpointer import TrainingProgress
from owl2.train.console import format_bytes
from owl2.train.distributed import DistributedContext

PACKAGES = ("torch", "transformers", "accelerate", "pillow")
# A loss that decreases by more than this factor is plotted on a logarithmic axis.
LOG_SCALE_RATIO = 5.0
Lines = Sequence[Mapping[str, Any]]


def write_run(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``run.json``: the results and the versions of the packages."""
    versions = {"owl2": __version__, "python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    atomic_write_text(path, json.dumps({**results, "versions": versions}, indent=2) + "\n")


def peak_memory(device: torch.device, context: DistributedContext) -> dict[str, Any]:
    """The peak memory in bytes since the processes started; all processes must call it.

    Returns:
        `process` (resident) and, on a GPU, `gpu`: the maximum over the processes. With several
        processes also `process_by_rank` and `gpu_by_rank`.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    own = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        own["gpu"] = torch.cuda.max_memory_allocated(device)
    peaks: dict[str, Any] = {}
    for name, count in own.items():
        counts = [count if rank == context.rank else 0 for rank in range(context.world_size)]
        by_rank = [int(total) for total in context.all_reduce_sum(*counts)]
        peaks[name] = max(by_rank)
        if context.world_size > 1:
            peaks[f"{name}_by_rank"] = by_rank
    return peaks


def summarize_run(end: TrainingProgress, log: Lines, validations: Lines) -> dict[str, Any]:
    """The results of a run for ``run.json``.

    Args:
        log: The lines of ``log.jsonl``; `validations`: of ``validation.jsonl``.
    """
    seconds = max(end.seconds, 1e-9)
    results: dict[str, Any] = {
        "steps": end.step,
        "seconds": end.seconds,
        "samples": end.samples,
        "num_skipped": end.num_skipped,
        "tokens": end.tokens,
        "images": end.images,
        "samples_per_second": end.samples / seconds,
        "tokens_per_second": end.tokens / seconds,
        "data_wait_fraction": end.data_wait_seconds / seconds,
        "first_loss": log[0]["loss"],
        "loss": log[-1]["loss"],
        "smoothed_loss": log[-1]["smoothed_loss"],
    }
    if validations:
        best = min(validations, key=lambda line: line["loss"])
        chosen = {"first": validations[0], "last": validations[-1], "best": best}
        results["validation"] = {
            name: {key: line[key] for key in ("step", "loss")} for name, line in chosen.items()
        }
        results["validation_seconds"] = sum(line["seconds"] for line in validations)
    return results


def summary_table(results: Mapping[str, Any], files: Mapping[str, Path]) -> Table:
    """The results of a run for the terminal, and the `files` that exist, by title."""
    table = Table(title="Summary", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _summary_rows(results):
        table.add_row(name, value)
    table.add_section()
    for name, path in files.items():
        if path.exists():
            table.add_row(name, Text(str(path)))
    return table


def _summary_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{results['steps']:,} in {timedelta(seconds=round(results['seconds']))}"
    yield "loss", f"{results['first_loss']:.4f} → {results['smoothed_loss']:.4f} (smoothed)"
    if validation := results.get("validation"):
        first, last, best = validation["first"], validation["last"], validation["best"]
        lowest = "" if best == last else f"; lowest {best['loss']:.4f} at step {best['step']:,}"
        yield "validation loss", f"{first['loss']:.4f} → {last['loss']:.4f}{lowest}"
    skipped = results["num_skipped"]
    yield "samples", f"{results['samples']:,}" + (f", {skipped:,} skipped" if skipped else "")
    yield "tokens, images", f"{results['tokens']:,}, {results['images']:,}"
    samples, tokens = results["samples_per_second"], results["tokens_per_second"]
    yield "speed", f"{samples:,.1f} samples/s, {tokens:,.0f} tokens/s"
    yield "data wait", f"{results['data_wait_fraction']:.1%} of the time"
    peaks = results["peak_memory_bytes"]
    gpu = f", GPU {format_bytes(peaks['gpu'])}" if "gpu" in peaks else ""
    yield "peak memory", f"process {format_bytes(peaks['process'])}{gpu}"


def plot_loss(path: Path, log: Lines, validations: Lines, title: str) -> bool:
    """Plot loss, learning rate and gradient norm over the steps.

    Returns:
        False if matplotlib (the extra ``plot``) is not installed, so that there is no plot.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    steps = [line["step"] for line in log]
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title)
    loss, rate, norm = figure.subplots(3, sharex=True, height_ratios=[4, 1, 1])
    _plot_losses(loss, steps, log, validations)
    rate.plot(steps, [line["learning_rate"] for line in log], color="tab:orange")
    rate.set(ylabel="learning rate")
    rate.set_ylim(bottom=0)
    norm.plot(steps, _positive([line["grad_norm"] for line in log]), color="tab:green")
    norm.set(xlabel="step", ylabel="gradient norm", yscale="log")
    _decimal_ticks(norm)
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)
    return True


def _plot_losses(axes: Any, steps: Sequence[int], log: Lines, validations: Lines) -> None:
    losses = _positive([line["loss"] for line in log])
    smoothed = _positive([line["smoothed_loss"] for line in log])
    held_out = [line["loss"] for line in validations]
    axes.plot(steps, losses, color="0.8", linewidth=1, label="training", zorder=1)
    axes.plot(steps, smoothed, color="tab:blue", linewidth=2, label="smoothed", zorder=2)
    if validations:
        at = [line["step"] for line in validations]
        axes.plot(at, held_out, "o-", color="tab:red", markersize=4, label="validation", zorder=3)
    axes.set(ylabel="loss per token (nats)")
    values = [value for value in (*smoothed, *held_out) if value > 0]  # NaN is not
    if values and max(values) > LOG_SCALE_RATIO * min(values):
        axes.set_yscale("log")
        _decimal_ticks(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _decimal_ticks(axes: Any) -> None:
    """Ticks 0.1, 0.2, 0.5, 1 on a logarithmic axis; on a long one 0.1, 1."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_ylim()
    multiples = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=multiples, numticks=15))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _positive(values: Sequence[float]) -> list[float]:
    """NaN for zeros (batches without labels), which a logarithmic axis cannot show."""
    return [value if value > 0 else float("nan") for value in values]
