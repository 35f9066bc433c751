"""What is left of a run for people: ``loss.png`` and ``run.json``."""

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from owl2 import __version__
from owl2.files import write_whole

PACKAGES = ("torch", "transformers", "accelerate", "pillow")


def write_run(path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``run.json``: what was measured, and in which versions of what."""
    versions = {"owl2": __version__, "python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    write_whole(path, json.dumps({**facts, "versions": versions}, indent=2) + "\n")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most bytes held at once since the process began: resident ones and, on a GPU, the GPU's."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def plot_loss(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Draw loss and learning rate over the steps.

    Returns:
        False if matplotlib (the extra ``plot``) is not installed, so nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    above.plot(steps, [line["loss"] for line in lines], color="0.75", linewidth=1, label="loss")
    smooth = [line["smoothed_loss"] for line in lines]
    above.plot(steps, smooth, color="tab:blue", linewidth=2, label="smoothed")
    above.set(title=title, ylabel="loss a token (nats)")
    # Logarithmic: the first steps would dwarf all that comes after. Linear around 0, which a
    # batch without labels has.
    above.set_yscale("symlog", linthresh=1e-3)
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    below.plot(steps, [line["learning_rate"] for line in lines], color="tab:orange")
    below.set(xlabel="step", ylabel="learning rate")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True
