"""Plots of an evaluation: examples with their images, and a radar plot against the paper.

They need matplotlib (the extra ``plot``); ask `has_matplotlib` first.
"""

import importlib.util
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.metrics import Each
from owl2.eval.samples import Answer
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image

COLUMNS = 4
EXAMPLES = 8  # spread evenly over all questions, right or wrong as they come
MISTAKES = 4  # and so many of the wrong ones
FEWEST_AXES = 3  # of a radar plot

Scored = tuple[Answer, Each]


def has_matplotlib() -> bool:
    """Whether there can be plots."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_answers(path: Path, scored: Sequence[Scored], title: str) -> None:
    """A grid of images with question and answer: examples, and below them mistakes."""
    from matplotlib.figure import Figure

    shown = _spread(scored, EXAMPLES)
    wrong = [pair for pair in scored if pair[1] == 0 and pair not in shown]
    shown += _spread(wrong, MISTAKES)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 0.6 + 2.9 * rows), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (answer, score) in zip(grid, shown, strict=False):
        images = parse_messages(answer.question.messages).images
        try:
            if images:
                axes.imshow(load_image(images[0]))
        except InputError as error:  # gone since it was asked about
            axes.text(0.5, 0.5, textwrap.fill(str(error), 30), ha="center", parse_math=False)
        question = textwrap.fill(textwrap.shorten(answer.question.text, 90), 30)
        # Words from outside are no formulas, whatever signs are in them.
        axes.set_title(
            f"{question}\n{textwrap.shorten(_said(answer, score), 34)}",
            fontsize=9,
            color=_colour(score),
            parse_math=False,
        )
    _save(figure, path)


def draw_radar(path: Path, shares: Mapping[str, float], name: str) -> bool:
    """A benchmark an axis; the paper's figures are the circle, ours are shares of them.

    Args:
        shares: ours divided by the paper's, by benchmark.

    Returns:
        False where there are too few for a plot.
    """
    from matplotlib.figure import Figure

    if len(shares) < FEWEST_AXES:
        return False
    angles = [2 * math.pi * number / len(shares) for number in range(len(shares))]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for values, label, colour in (
        ([1.0] * len(shares), "the paper", "tab:gray"),
        (list(shares.values()), name, "tab:blue"),
    ):
        closed = [*zip(angles, values, strict=True), (angles[0], values[0])]
        axes.plot(*zip(*closed, strict=True), label=label, color=colour)
        axes.fill(*zip(*closed, strict=True), alpha=0.12, color=colour)
    axes.set_xticks(angles, [""] * len(shares))
    edge = max(1.1, *shares.values())
    axes.set_ylim(0, edge)
    for angle, label in zip(angles, shares, strict=True):
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
        # An untrained model says anything, and not every font has it: it becomes a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=120)


def _said(answer: Answer, score: Each) -> str:
    if score != 0 or not answer.question.expected:
        return answer.text
    return f"{answer.text} (not {' or '.join(dict.fromkeys(answer.question.expected))})"


def _colour(score: Each) -> str:
    if score is None:
        return "black"
    return "crimson" if score == 0 else "green" if score >= 0.5 else "darkorange"


def _spread(scored: Sequence[Scored], count: int) -> list[Scored]:
    if len(scored) <= count:
        return list(scored)
    return [scored[place * len(scored) // count] for place in range(count)]
