"""Plots of an evaluation: examples with their images, and a radar plot against the paper.

They need matplotlib (the extra ``plot``); call `has_matplotlib` first.
"""

import importlib.util
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.metrics import SampleScore
from owl2.eval.samples import Response
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image

COLUMNS = 4
EXAMPLES = 8  # evenly spaced over all samples, correct or not
MISTAKES = 4  # additional samples with a score of 0
MIN_AXES = 3  # of a radar plot

ScoredResponse = tuple[Response, SampleScore]


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_examples(path: Path, scored: Sequence[ScoredResponse], title: str) -> None:
    """Write a grid of images with question and response: examples, and mistakes below them."""
    from matplotlib.figure import Figure

    shown = _spread(scored, EXAMPLES)
    mistakes = [pair for pair in scored if pair[1] == 0 and pair not in shown]
    shown += _spread(mistakes, MISTAKES)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 0.6 + 2.9 * rows), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (response, score) in zip(grid, shown, strict=False):
        images = parse_messages(response.sample.messages).images
        try:
            if images:
                axes.imshow(load_image(images[0]))
        except InputError as error:  # the file was removed during the evaluation
            axes.text(0.5, 0.5, textwrap.fill(str(error), 30), ha="center", parse_math=False)
        question = textwrap.fill(textwrap.shorten(response.sample.question, 90), 30)
        text = response.text
        if score == 0 and response.sample.expected:
            text += f" (not {' or '.join(dict.fromkeys(response.sample.expected))})"
        # Dollar signs in the text do not start a formula.
        caption = f"{question}\n{textwrap.shorten(text, 34)}"
        axes.set_title(caption, fontsize=9, color=_color(score), parse_math=False)
    _save(figure, path)


def plot_radar(path: Path, ratios: Mapping[str, float], name: str) -> bool:
    """Write a plot with one axis per benchmark; the results of the paper are the unit circle.

    Args:
        ratios: Our values divided by those of the paper, by benchmark.

    Returns:
        False if there are too few benchmarks for a plot.
    """
    from matplotlib.figure import Figure

    if len(ratios) < MIN_AXES:
        return False
    angles = [2 * math.pi * index / len(ratios) for index in range(len(ratios))]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for values, label, color in (
        ([1.0] * len(ratios), "paper", "tab:gray"),
        (list(ratios.values()), name, "tab:blue"),
    ):
        closed = [*zip(angles, values, strict=True), (angles[0], values[0])]
        axes.plot(*zip(*closed, strict=True), label=label, color=color)
        axes.fill(*zip(*closed, strict=True), alpha=0.12, color=color)
    axes.set_xticks(angles, [""] * len(ratios))
    edge = max(1.1, *ratios.values())
    axes.set_ylim(0, edge)
    for angle, label in zip(angles, ratios, strict=True):
        side = math.cos(angle)
        align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        axes.text(angle, 1.05 * edge, label, ha=align, va="center", parse_math=False)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["25%", "50%", "75%", "100%"])
    legend = axes.legend(loc="upper right", bbox_to_anchor=(1.25, 1.15))
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        # Fonts lack some characters of the responses; a box replaces them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=120)


def _color(score: SampleScore) -> str:
    if score is None:
        return "black"
    return "crimson" if score == 0 else "green" if score >= 0.5 else "darkorange"


def _spread(scored: Sequence[ScoredResponse], count: int) -> list[ScoredResponse]:
    if len(scored) <= count:
        return list(scored)
    return [scored[index * len(scored) // count] for index in range(count)]
