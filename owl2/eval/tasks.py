"""Tasks by name: what is asked, how, and how answers are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from owl2.data.datasets.easy_vqa import SHORT_PROMPT
from owl2.data.sample import Message
from owl2.errors import InputError
from owl2.eval.metrics import Metric, find_metric
from owl2.eval.readers import Reader, Source, find_reader, sorted_out
from owl2.eval.samples import Broken, Question
from owl2.eval.task_config import SUITES, Recipe, recipes
from owl2.processing.chat_template import IMAGE_TOKEN
from owl2.registry import look_up

FILE_ENDING = ".jsonl"  # of one's own questions


@dataclass(frozen=True)
class Task:
    """A benchmark, ready to be asked."""

    name: str
    recipe: Recipe
    reader: Reader
    metric: Metric

    @classmethod
    def of(cls, name: str, recipe: Recipe) -> "Task":
        return cls(name, recipe, find_reader(recipe.reader), find_metric(recipe.metric))

    def source(self, data: Path | None, prompt: str | None = None) -> Source:
        """Its files in ``--data``, and the prompt to use.

        Args:
            prompt: instead of its own, with ``{question}`` in it; "short" for the question alone.
        """
        if prompt is None:
            prompt = self.recipe.prompt
        elif prompt == "short":
            prompt = SHORT_PROMPT
        folders = () if data is None else (data / self.name, data)
        where = self.recipe.data
        advice = f"Get {self.recipe.title} from {where.origin} (licence: {where.licence})."
        return Source(folders, prompt, dict(self.recipe.options), advice)

    def read(self, source: Source) -> tuple[list[Question], list[Broken]]:
        """Its questions, and what cannot be asked.

        Raises:
            MissingData: a file is not there.
            InputError: a file is not what it should be.
        """
        return sorted_out(self.reader(source))


def find_tasks(
    names: str | None, suite: str | None = None, table: Mapping[str, Recipe] | None = None
) -> list[Task]:
    """The tasks of a list such as "mme,pope,mine.jsonl" and of a suite ("paper": all), each once.

    Raises:
        InputError: a name that is no task's (says which is the nearest), or none at all; a file of
            one's own questions that is not there, cannot be read, or is called as a task is.
    """
    table = recipes() if table is None else table
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    files = [name for name in dict.fromkeys(wanted) if name.endswith(FILE_ENDING)]
    own = [_own(Path(name), table) for name in files]
    _require_different([task.name for task in own])
    found = {n: look_up("task", n, table) for n in dict.fromkeys(wanted) if n not in files}
    if suite is not None:
        look_up("suite", suite, dict.fromkeys((*SUITES, "paper")))
        for name, recipe in table.items():
            if recipe.suite == suite or (suite == "paper" and recipe.suite):
                found.setdefault(name, recipe)
    if not found and not own:
        raise InputError(f"No task is named. There are: {', '.join(sorted(table))}.")
    return [*(Task.of(name, recipe) for name, recipe in found.items()), *own]


def _own(path: Path, table: Mapping[str, Recipe]) -> Task:
    from owl2.eval.readers.custom import own_task  # it makes a Task, which is defined here

    if not path.is_file():
        raise InputError(f"There is no file {path} with questions. Check the path.")
    task = own_task(path)
    if task.name in table:
        raise InputError(f"{path} is called as the task {task.name!r} is: rename the file.")
    return task


def _require_different(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two files are called {twice}{FILE_ENDING}: rename one.")


def without_images(messages: Sequence[Message]) -> list[Message]:
    """The same messages, blind: no image, and no place for one."""
    return [{**message, "content": _words(message["content"])} for message in messages]


def _words(content: str | list[Message]) -> str | list[Message]:
    if isinstance(content, str):
        return content.replace(IMAGE_TOKEN, "")
    texts = [part for part in content if part["type"] == "text"]
    return [{**part, "text": part["text"].replace(IMAGE_TOKEN, "")} for part in texts]
