"""Tasks by name: a configuration with its metric and its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError, require_package
from owl2.eval.metrics import Metric, find_metric
from owl2.eval.readers import EvalData
from owl2.eval.readers.custom import custom_config
from owl2.eval.readers.fields import read_samples
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.eval.task_config import SUITES, TaskConfig, task_configs
from owl2.files import expand_user
from owl2.registry import look_up

CUSTOM_SUFFIX = ".jsonl"  # of the user's own files


@dataclass(frozen=True)
class EvalTask:
    """A benchmark, or a file with custom questions in `directory`."""

    name: str
    config: TaskConfig
    directory: Path | None = None

    @cached_property
    def metric(self) -> Metric:
        """Raises `AttributeError` or `ModuleNotFoundError` if it does not exist."""
        return find_metric(self.config.metric)

    def data(
        self, directory: Path | None, prompt: str | None = None, prompts: str = "authors"
    ) -> EvalData:
        """The files of the task in ``--data``, and the prompt.

        Args:
            prompt: Replaces the prompt of the task; "short" is the question alone.
            prompts: "authors": the prompt and the chat format of the task. "plain": its plain
                prompt in the chat format of the checkpoint, which also applies to `prompt`.

        Raises:
            InputError: The prompt does not contain ``{question}``.
        """
        config, files = self.config, self.config.data
        has_task_format = prompt is None and prompts == "authors"
        own = config.plain_prompt if prompts == "plain" and config.plain_prompt else config.prompt
        has_question = "{question}" in own
        if prompt is None or prompt == "short":
            prompt = "{question}" if prompt and has_question else own
        elif has_question and "{question}" not in prompt:
            raise InputError(
                f"The prompt {prompt!r:.80} must be 'short' or contain {{question}}.",
                ErrorCode.INVALID_VALUE,
            )
        folders = [] if self.directory is None else [self.directory]
        folders += [] if directory is None else [directory / self.name, directory]
        advice = f"Get {self.config.title} from {files.origin} (license: {files.license})."
        return EvalData(tuple(folders), prompt, has_task_format, files, advice)

    def max_new_tokens(self, samples: Sequence[EvalSample], tokenizer: Any) -> int:
        """The limit of the task; for custom questions also enough for the longest answer."""
        counts = [self.config.max_new_tokens]
        if self.directory is not None:
            answers = {answer for sample in samples for answer in sample.expected}
            # The tokenizer adds a begin token; a response has an end token instead.
            counts += [len(tokenizer(answer)["input_ids"]) for answer in answers]
        return max(counts)

    def read(self, data: EvalData) -> tuple[list[EvalSample], list[InvalidEvalSample]]:
        """All samples, valid and invalid; one with the id of an earlier sample is invalid.

        Raises:
            InputError: A file is missing (FILE_NOT_FOUND), or its format is wrong; the package of
                the metric is missing.
        """
        if self.metric.package:  # a missing one is an error before the first response
            require_package(self.metric.package, f"The metric {self.metric.name}", "eval")
        samples: dict[str, EvalSample] = {}
        invalid: list[InvalidEvalSample] = []
        for item in read_samples(self.config, data):
            if isinstance(item, InvalidEvalSample):
                invalid.append(item)
            elif item.id in samples:
                invalid.append(InvalidEvalSample(item.id, "An earlier sample has the same id."))
            else:
                samples[item.id] = item
        return list(samples.values()), invalid


def find_tasks(names: str | None, suite: str | None = None) -> list[EvalTask]:
    """The tasks of a list such as "mme,pope,mine.jsonl" and of a suite, without duplicates.

    Args:
        suite: One of `SUITES`, or "paper" for the tasks of all of them that the paper has.

    Raises:
        InputError: A name is unknown (the message names the nearest one), or there are no names; a
            custom file does not exist, cannot be read, or has the name of another task.
    """
    table = task_configs()
    found: dict[str, EvalTask] = {}
    for name in filter(None, map(str.strip, (names or "").split(","))):
        if not name.endswith(CUSTOM_SUFFIX):
            found[name] = EvalTask(name, look_up("task", name, table))
            continue
        path = expand_user(name)
        if not path.is_file():
            raise InputError(f"There is no file {path}.", ErrorCode.FILE_NOT_FOUND)
        is_other = path.stem in found and found[path.stem].directory != path.parent
        if path.stem in table or is_other:
            raise InputError(
                f"{path} has the name of another task, {path.stem!r}. Rename the file.",
                ErrorCode.CONFLICT,
            )
        found[path.stem] = EvalTask(path.stem, custom_config(path), path.parent)
    if suite is not None:
        look_up("suite", suite, dict.fromkeys((*SUITES, "paper")))
        for name, config in table.items():
            if config.suite == suite or (suite == "paper" and config.suite and config.in_paper):
                found.setdefault(name, EvalTask(name, config))
    if not found:
        raise InputError(
            f"No task is named. Choose from {', '.join(sorted(table))}.", ErrorCode.MISSING_VALUE
        )
    return list(found.values())
