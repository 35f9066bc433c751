"""The report of a finished run: ``loss.png``, ``run.json`` and a summary on the terminal."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from owl2.fonts import save_figure
from owl2.memory import peak_resident_memory
from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext

# A loss that decreases by more than this factor is plotted on a logarithmic axis.
LOG_SCALE_RATIO = 5.0
Lines = Sequence[Mapping[str, Any]]


def peak_memory(device: torch.device, context: DistributedContext) -> dict[str, Any]:
    """The peak memory in bytes since the processes started; all processes must call it.

    Returns:
        `process` (resident) and, on a GPU, `gpu`: the maximum over the processes. With several
        processes also `process_by_rank` and `gpu_by_rank`.
    """
    own = {"process": peak_resident_memory()}
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
        "num_skipped": end.num_skipped,
        "samples": end.samples,
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
    columns = (Column(style="dim"), Column(overflow="fold"))
    table = Table(*columns, title="Summary", title_justify="left", show_header=False)
    duration = timedelta(seconds=round(results["seconds"]))
    table.add_row("steps", f"{results['steps']:,} in {duration}")
    table.add_row(
        "loss", f"{results['first_loss']:.4f} → {results['smoothed_loss']:.4f} (smoothed)"
    )
    if validation := results.get("validation"):
        first, last, best = validation["first"], validation["last"], validation["best"]
        lowest = "" if best == last else f"; lowest {best['loss']:.4f} at step {best['step']:,}"
        table.add_row("validation loss", f"{first['loss']:.4f} → {last['loss']:.4f}{lowest}")
    skipped = f", {results['num_skipped']:,} skipped" if results["num_skipped"] else ""
    table.add_row("samples", f"{results['samples']:,}{skipped}")
    table.add_row("tokens, images", f"{results['tokens']:,}, {results['images']:,}")
    samples, tokens = results["samples_per_second"], results["tokens_per_second"]
    table.add_row("speed", f"{samples:,.1f} samples/s, {tokens:,.0f} tokens/s")
    table.add_row("data wait", f"{results['data_wait_fraction']:.1%} of the time")
    peaks = results["peak_memory_bytes"]
    gpu = f", GPU {decimal(peaks['gpu'])}" if "gpu" in peaks else ""
    table.add_row("peak memory", f"process {decimal(peaks['process'])}{gpu}")
    table.add_section()
    for name, path in files.items():
        if path.exists():
            table.add_row(name, Text(str(path)))
    return table


def plot_loss(path: Path, log: Lines, validations: Lines, title: str) -> bool:
    """Plot loss, learning rate and gradient norm over the steps.

    Returns:
        False if matplotlib (the extra ``plot``) is not installed, so that there is no plot.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title)
    loss, rate, norm = figure.subplots(3, sharex=True, height_ratios=[4, 1, 1])
    loss.plot(*_curve(log, "loss"), color="0.8", linewidth=1, label="training")
    steps, smoothed = _curve(log, "smoothed_loss")
    loss.plot(steps, smoothed, color="tab:blue", linewidth=2, label="smoothed")
    held_out = _curve(validations, "loss")
    if validations:
        loss.plot(*held_out, "o-", color="tab:red", markersize=4, label="validation")
    loss.set(ylabel="loss per token (nats)")
    values = [value for value in (*smoothed, *held_out[1]) if value > 0]  # NaN is not
    if values and max(values) > LOG_SCALE_RATIO * min(values):
        _use_log_scale(loss)
    else:
        loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    rate.plot(steps, [line["learning_rate"] for line in log], color="tab:orange")
    rate.set(ylabel="learning rate")
    rate.set_ylim(bottom=0)
    norm.plot(*_curve(log, "grad_norm"), color="tab:green")
    norm.set(xlabel="step", ylabel="gradient norm")
    _use_log_scale(norm)
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    save_figure(figure, path, dpi=120)
    return True


def _curve(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """The steps and values of a log; NaN for zeros (batches without labels), which a logarithmic
    axis cannot show."""
    values = [line[name] if line[name] > 0 else float("nan") for line in lines]
    return [line["step"] for line in lines], values


def _use_log_scale(axes: Any) -> None:
    """Logarithmic axis with ticks at 0.1, 0.2, 0.5, 1; over a long range at 0.1, 1."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    multiples = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=multiples, numticks=15))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
