"""``owl2 eval --list``: the tasks, the results of the paper, and missing data."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from owl2.errors import InputError
from owl2.eval.task_config import task_configs
from owl2.eval.tasks import EvalTask


def missing_data(task: EvalTask, directory: Path | None) -> str:
    """What is missing of a task and where to get it; "" if its data exists.

    The files are searched by their names. Their content, and whether all images exist, is not
    checked, as this takes minutes for some tasks. A task without files is read instead.
    """
    data = task.data(directory)
    missing = []
    for entry in task.config.data.files:  # patterns, alternatives separated by " or "
        patterns = entry.split(" or ")
        folders = data.directories
        found = (data.matches(folder, pattern) for folder in folders for pattern in patterns)
        if all(next(paths, None) is None for paths in found):
            missing.append(entry)
    if missing:
        place = str(data.directories[0]) if data.directories else "the directory of --data"
        return f"{', '.join(missing)} not in {place}. {data.advice}"
    if task.config.data.files:
        return ""
    try:
        samples, _ = task.read(data)
    except InputError as error:
        return str(error)
    return "" if samples else "There is no valid sample."


def print_tasks(directory: Path | None, console: Console) -> None:
    """Print all tasks, and below them what is missing and where to get it."""
    table = Table(title="Tasks", title_justify="left")
    for column in ("suite", "task", "paper", "data", "judge"):
        table.add_column(column, no_wrap=column != "paper")
    lines = []
    for name, config in task_configs().items():
        missing = missing_data(EvalTask(name, config), directory)
        if missing:
            lines.append(f"{name}: {missing}")
        results, model = config.paper, ""
        if config.published:  # the first model
            name_of_model, results = next(iter(config.published.items()))
            model = f"{name_of_model.split('/')[-1]}: "
        paper = (
            f"{m} {value:g}" if len(results) > 1 else f"{value:g}" for m, value in results.items()
        )
        table.add_row(
            config.suite or "",
            name,
            model + ", ".join(paper),
            "missing" if missing else "found",
            "required" if config.judge else "",
        )
    console.print(table)
    if directory is None:
        lines.append("The data of a task is searched in DIR/TASK and DIR of --data DIR.")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
