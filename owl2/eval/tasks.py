"""Tasks by name: a configuration with its reader and its metric."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, find_metric
from owl2.eval.readers import EvalData, Reader, find_reader, split_invalid
from owl2.eval.readers.custom import custom_config
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.eval.task_config import SUITES, TaskConfig, task_configs
from owl2.registry import look_up

CUSTOM_SUFFIX = ".jsonl"  # of the user's own files


@dataclass(frozen=True)
class EvalTask:
    """A benchmark with its reader and its metric."""

    name: str
    config: TaskConfig
    reader: Reader
    metric: Metric

    @classmethod
    def from_config(cls, name: str, config: TaskConfig) -> "EvalTask":
        """Raises `AttributeError` or `ModuleNotFoundError` for an unknown reader or metric."""
        return cls(name, config, find_reader(config.reader), find_metric(config.metric))

    def data(self, directory: Path | None, prompt: str | None = None) -> EvalData:
        """The files of the task in ``--data``, and the prompt.

        Args:
            prompt: Replaces the prompt of the task, contains ``{question}``; "short" is the
                question alone.
        """
        if prompt is None:
            prompt = self.config.prompt
        elif prompt == "short":
            prompt = "{question}"
        directories = () if directory is None else (directory / self.name, directory)
        files = self.config.data
        advice = f"Get {self.config.title} from {files.origin} (license: {files.license})."
        return EvalData(directories, prompt, dict(self.config.dataset_kwargs), advice)

    def read(self, data: EvalData) -> tuple[list[EvalSample], list[InvalidEvalSample]]:
        """All samples, valid and invalid.

        Raises:
            InputError: A file is missing (FILE_NOT_FOUND), or its format is wrong.
        """
        return split_invalid(self.reader(data))


def find_tasks(
    names: str | None, suite: str | None = None, table: Mapping[str, TaskConfig] | None = None
) -> list[EvalTask]:
    """The tasks of a list such as "mme,pope,mine.jsonl" and of a suite, without duplicates.

    Args:
        suite: One of `SUITES`, or "paper" for all of them.

    Raises:
        InputError: A name is unknown (the message names the nearest one), or there are no names; a
            custom file does not exist, cannot be read, or has the name of another task.
    """
    table = task_configs() if table is None else table
    requested = dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip())
    custom = [_custom_task(Path(name), table) for name in requested if name.endswith(CUSTOM_SUFFIX)]
    custom_names = [task.name for task in custom]
    duplicate = next((name for name in custom_names if custom_names.count(name) > 1), None)
    if duplicate is not None:
        raise InputError(
            f"Two files are called {duplicate}{CUSTOM_SUFFIX}. Rename one.", ErrorCode.CONFLICT
        )
    found = {n: look_up("task", n, table) for n in requested if not n.endswith(CUSTOM_SUFFIX)}
    if suite is not None:
        look_up("suite", suite, dict.fromkeys((*SUITES, "paper")))
        for name, config in table.items():
            if config.suite == suite or (suite == "paper" and config.suite):
                found.setdefault(name, config)
    if not found and not custom:
        raise InputError(
            f"No task is named. Choose from {', '.join(sorted(table))}.", ErrorCode.MISSING_VALUE
        )
    return [*(EvalTask.from_config(name, config) for name, config in found.items()), *custom]


def _custom_task(path: Path, table: Mapping[str, TaskConfig]) -> EvalTask:
    if not path.is_file():
        raise InputError(f"There is no file {path}.", ErrorCode.FILE_NOT_FOUND)
    if path.stem in table:
        raise InputError(
            f"{path} has the name of the task {path.stem!r}. Rename the file.", ErrorCode.CONFLICT
        )
    config, reader = custom_config(path)
    return EvalTask(path.stem, config, reader, find_metric(config.metric))
