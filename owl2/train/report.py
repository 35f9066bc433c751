"""What is left of a run for people: ``loss.png``, ``run.json`` and a summary on the terminal."""

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
from owl2.train.checkpointer import Position
from owl2.train.console import size
from owl2.train.distributed import Team

PACKAGES = ("torch", "transformers", "accelerate", "pillow")
# A loss that has fallen by more than this is drawn on a logarithmic axis.
WIDE = 5.0


def write_run(path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``run.json``: what was measured, and in which versions of what."""
    versions = {"owl2": __version__, "python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    atomic_write_text(path, json.dumps({**facts, "versions": versions}, indent=2) + "\n")


def peak_memory(device: torch.device, team: Team) -> dict[str, Any]:
    """Most bytes held at once since the processes began; all processes must ask.

    Returns:
        `process`, resident ones, and, on a GPU, `gpu`: of the process that held most. With several
        processes also `process_each` and `gpu_each`, by rank.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    held = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        held["gpu"] = torch.cuda.max_memory_allocated(device)
    peaks: dict[str, Any] = {}
    for name, count in held.items():
        places = [0] * team.size
        places[team.rank] = count
        each = [int(number) for number in team.total(*places)]
        peaks |= {name: max(each)} | ({f"{name}_each": each} if team.size > 1 else {})
    return peaks


def measured(
    end: Position, lines: Sequence[Mapping[str, Any]], looks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run came to, for ``run.json``: its position, and the lines of its two logs."""
    seconds = max(end.seconds, 1e-9)
    facts: dict[str, Any] = {
        "steps": end.step,
        "seconds": end.seconds,
        "samples": end.samples,
        "samples_left_out": end.left_out,
        "tokens": end.tokens,
        "images": end.images,
        "samples_per_second": end.samples / seconds,
        "tokens_per_second": end.tokens / seconds,
        "data_wait_fraction": end.waited / seconds,
        "first_loss": lines[0]["loss"],
        "loss": lines[-1]["loss"],
        "smoothed_loss": lines[-1]["smoothed_loss"],
    }
    if looks:
        best = min(looks, key=lambda look: look["loss"])
        chosen = {"first": looks[0], "last": looks[-1], "best": best}
        facts["validation"] = {
            name: {key: look[key] for key in ("step", "loss")} for name, look in chosen.items()
        }
        facts["validation_seconds"] = sum(look["seconds"] for look in looks)
    return facts


def summary(facts: Mapping[str, Any], files: Mapping[str, Path]) -> Table:
    """What a run came to, for the terminal. `files`: where things are, by what they are."""
    table = Table(title="What came of it", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _summed_up(facts):
        table.add_row(name, value)
    table.add_section()
    for name, path in files.items():
        if path.exists():
            table.add_row(name, Text(str(path)))
    return table


def _summed_up(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{facts['steps']:,} in {timedelta(seconds=round(facts['seconds']))}"
    yield "loss", f"{facts['first_loss']:.4f} → {facts['smoothed_loss']:.4f} (smoothed)"
    if looks := facts.get("validation"):
        first, last, best = looks["first"], looks["last"], looks["best"]
        least = "" if best == last else f"; least {best['loss']:.4f} at step {best['step']:,}"
        yield "validation loss", f"{first['loss']:.4f} → {last['loss']:.4f}{least}"
    left_out = facts["samples_left_out"]
    yield "samples", f"{facts['samples']:,}" + (f", {left_out:,} left out" if left_out else "")
    yield "tokens, images", f"{facts['tokens']:,}, {facts['images']:,}"
    samples, tokens = facts["samples_per_second"], facts["tokens_per_second"]
    yield "speed", f"{samples:,.1f} samples/s, {tokens:,.0f} tokens/s"
    yield "waiting for data", f"{facts['data_wait_fraction']:.1%} of the time"
    peaks = facts["peak_memory_bytes"]
    gpu = f", GPU {size(peaks['gpu'])}" if "gpu" in peaks else ""
    yield "most memory", f"process {size(peaks['process'])}{gpu}"


def plot_loss(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    looks: Sequence[Mapping[str, Any]],
    title: str,
) -> bool:
    """Draw loss, learning rate and gradient norm over the steps, of the lines of the two logs.

    Returns:
        False if matplotlib (the extra ``plot``) is not installed, so nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title)
    loss, rate, norm = figure.subplots(3, sharex=True, height_ratios=[4, 1, 1])
    _draw_loss(loss, steps, lines, looks)
    rate.plot(steps, [line["learning_rate"] for line in lines], color="tab:orange")
    rate.set(ylabel="rate")
    rate.set_ylim(bottom=0)
    norm.plot(steps, _positive([line["grad_norm"] for line in lines]), color="tab:green")
    norm.set(xlabel="step", ylabel="gradient", yscale="log")
    _plain_ticks(norm)
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)
    return True


def _draw_loss(
    axes: Any,
    steps: Sequence[int],
    lines: Sequence[Mapping[str, Any]],
    looks: Sequence[Mapping[str, Any]],
) -> None:
    losses = _positive([line["loss"] for line in lines])
    smooth = _positive([line["smoothed_loss"] for line in lines])
    axes.plot(steps, losses, color="0.8", linewidth=1, label="training", zorder=1)
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="training, smoothed", zorder=2)
    held_out = [look["loss"] for look in looks]
    if looks:
        at = [look["step"] for look in looks]
        axes.plot(at, held_out, "o-", color="tab:red", markersize=4, label="validation", zorder=3)
    axes.set(ylabel="loss a token (nats)")
    drawn = [value for value in (*smooth, *held_out) if value > 0]  # NaN is not
    if drawn and max(drawn) > WIDE * min(drawn):
        # Or the first steps would dwarf all that comes after.
        axes.set_yscale("log")
        _plain_ticks(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _plain_ticks(axes: Any) -> None:
    """0.1, 0.2, 0.5, 1 on a logarithmic axis, instead of powers of ten; if it is long 0.1, 1."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=15))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _positive(values: Sequence[float]) -> list[float]:
    """Without zeros, which a batch without labels has and a logarithmic axis has no place for."""
    return [value if value > 0 else float("nan") for value in values]
