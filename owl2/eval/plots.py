"""Plots of an evaluation: examples with their images, and a radar plot against the paper.

They need matplotlib (the extra ``plot``); call `has_matplotlib` first.
"""

import importlib.util
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.metrics import SampleScore
from owl2.eval.samples import Response, evenly_spaced
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image

COLUMNS = 4
EXAMPLES = 8  # evenly spaced over all samples, correct or not
MISTAKES = 4  # additional samples with a score of 0
MIN_AXES = 3  # of a radar plot


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_examples(path: Path, scored: Sequence[tuple[Response, SampleScore]], title: str) -> None:
    """Write a grid of images with question and response: examples, and mistakes below them."""
    shown = evenly_spaced(scored, EXAMPLES)
    mistakes = [pair for pair in scored if pair[1] == 0 and pair not in shown]
    shown += evenly_spaced(mistakes, MISTAKES)
    rows = -(-len(shown) // COLUMNS)
    with _figure(path, 2.6 * COLUMNS, 0.6 + 2.9 * rows) as figure:
        figure.suptitle(title)
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (response, score) in zip(grid, shown, strict=False):
            try:
                for image in parse_messages(response.sample.messages).images[:1]:
                    axes.imshow(load_image(image))
            except InputError as error:  # the file was removed during the evaluation
                axes.text(0.5, 0.5, textwrap.fill(str(error), 30), ha="center")
            question = textwrap.fill(textwrap.shorten(response.sample.question, 90), 30)
            text = response.text
            if score == 0 and response.sample.expected:
                text += f" (not {' or '.join(dict.fromkeys(response.sample.expected))})"
            caption = f"{question}\n{textwrap.shorten(text, 34)}"
            axes.set_title(caption, fontsize=9, color=_color(score))


def plot_radar(path: Path, ratios: Mapping[str, float], name: str) -> bool:
    """Write a plot with one axis per benchmark; the results of the paper are the unit circle.

    Args:
        ratios: Our values divided by those of the paper, by benchmark.

    Returns:
        False if there are too few benchmarks for a plot.
    """
    if len(ratios) < MIN_AXES:
        return False
    angles = [2 * math.pi * index / len(ratios) for index in range(len(ratios))]
    with _figure(path, 7, 7) as figure:
        axes = figure.add_subplot(projection="polar")
        for values, label, color in (
            ([1.0] * len(ratios), "paper", "tab:gray"),
            (list(ratios.values()), name, "tab:blue"),
        ):
            closed = [*values, values[0]]
            axes.plot([*angles, angles[0]], closed, label=label, color=color)
            axes.fill([*angles, angles[0]], closed, alpha=0.12, color=color)
        axes.set_xticks(angles, [""] * len(ratios))
        edge = max(1.1, *ratios.values())
        axes.set_ylim(0, edge)
        for angle, label in zip(angles, ratios, strict=True):
            side = math.cos(angle)
            align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            axes.text(angle, 1.05 * edge, label, ha=align, va="center")
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["25%", "50%", "75%", "100%"])
        axes.legend(loc="upper right", bbox_to_anchor=(1.25, 1.15))
    return True


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure with a size in inches, which is written to `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Dollar signs in responses do not start a formula.
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        # Fonts lack some characters of the responses; a box replaces them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=120)


def _color(score: SampleScore) -> str:
    if score is None:
        return "black"
    return "crimson" if score == 0 else "green" if score >= 0.5 else "darkorange"
