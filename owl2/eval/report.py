"""What is left of an evaluation for people: a table on the terminal, and ``report.png``."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from owl2.eval.answering import Answer
from owl2.processing.chat import read_messages
from owl2.processing.sources import load_image

COLUMNS = 4
EXAMPLES = 8  # spread evenly over all questions, right or wrong as they come
MISTAKES = 4  # and so many of the wrong ones


def results_table(task: str, result: Mapping[str, Any]) -> Table:
    """A task's entry of ``results.json``: all questions, then kind by kind."""
    table = Table(title=task, title_justify="left")
    blind = "accuracy_blind" in result["metrics"]
    for column in ("questions", "n", "accuracy", *(["blind"] if blind else [])):
        table.add_column(column, justify="left" if column == "questions" else "right")
    rows = {"all": {"n": result["n"], **result["metrics"]}, **result["by_answer_kind"]}
    for name, row in rows.items():
        scores = [row["accuracy"], *([row["accuracy_blind"]] if blind else [])]
        table.add_row(name, f"{row['n']:,}", *(f"{score:.2%}" for score in scores))
    return table


def draw_answers(path: Path, answers: Sequence[Answer], title: str) -> bool:
    """A grid of pictures with question and answer: examples, and below them mistakes.

    Returns:
        False if matplotlib (the extra ``plot``) is not installed, so nothing was drawn.

    Raises:
        InputError: a picture that cannot be read.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    shown = [*_spread(answers, EXAMPLES)]
    wrong = [answer for answer in answers if not answer.is_right and answer not in shown]
    shown += _spread(wrong, MISTAKES)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 0.6 + 2.9 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, answer in zip(grid, shown, strict=False):
        pictures = read_messages(answer.question.messages).pictures
        if pictures:
            axes.imshow(load_image(pictures[0]))
        said = answer.text if answer.is_right else f"{answer.text} (not {_expected(answer)})"
        question = textwrap.fill(textwrap.shorten(answer.question.text, 90), 30)
        words = f"{question}\n{textwrap.shorten(said, 34)}"
        # Words from outside are no formulas, whatever signs are in them.
        axes.set_title(
            words, fontsize=9, color="green" if answer.is_right else "crimson", parse_math=False
        )
    with warnings.catch_warnings():
        # An untrained model says anything, and not every font has it: it becomes a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=120)
    return True


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    if len(answers) <= count:
        return list(answers)
    return [answers[place * len(answers) // count] for place in range(count)]


def _expected(answer: Answer) -> str:
    return " or ".join(answer.question.expected)
