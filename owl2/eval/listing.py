"""``owl2 eval --list``: every task, the paper's figure, and whether its data is here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from owl2.errors import InputError
from owl2.eval.readers import Source
from owl2.eval.samples import Question
from owl2.eval.task_config import Recipe, recipes
from owl2.eval.tasks import Task


@dataclass(frozen=True)
class State:
    """Of a task's data.

    Attributes:
        why: if it is not there, what is missing and where to get it.
    """

    found: bool
    why: str = ""


def data_state(task: Task, data: Path | None) -> State:
    """Whether its files are there, by their names; of a task without files, whether it can be read.

    Not whether they are whole, nor whether all images are there: that takes minutes for some.
    """
    source = task.source(data)
    if task.recipe.data.files:
        missing = [entry for entry in task.recipe.data.files if not _is_there(source, entry)]
        if not missing:
            return State(True)
        where = str(source.folders[0]) if source.folders else "the folder of --data"
        return State(False, f"{', '.join(missing)} not in {where}. {source.advice}")
    try:
        for item in task.reader(source):
            if isinstance(item, Question):
                return State(True)
    except InputError as error:
        return State(False, str(error))
    return State(False, "no question in it can be asked")


def _is_there(source: Source, entry: str) -> bool:
    """An entry of a recipe's files: names with ``*``, alternatives parted by " or "."""
    found = (folder.glob(name) for folder in source.folders for name in entry.split(" or "))
    return any(next(paths, None) is not None for paths in found)


def show_tasks(data: Path | None, console: Console) -> None:
    """Print all tasks, and below them what is missing and where to get it."""
    states = {name: data_state(Task.of(name, recipe), data) for name, recipe in recipes().items()}
    table = Table(title="Tasks", title_justify="left")
    for column in ("suite", "task", "the paper's", "data", "judge"):
        table.add_column(column, no_wrap=column != "the paper's")
    for name, recipe in recipes().items():
        table.add_row(
            recipe.suite or "",
            name,
            ", ".join(_figures(recipe)),
            "found" if states[name].found else "missing",
            "needed" if recipe.judge else "",
        )
    console.print(table)
    for name, state in states.items():
        if not state.found:
            _say(console, f"{name}: {state.why}")
    if data is None:
        _say(console, "Data is looked for in --data DIR, each task's in DIR/TASK, then in DIR.")


def _figures(recipe: Recipe) -> Iterator[str]:
    for name, figure in recipe.paper.items():
        yield f"{name} {figure:g}" if len(recipe.paper) > 1 else f"{figure:g}"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
