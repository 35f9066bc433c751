"""A whole evaluation, from names of tasks to ``results.json``.

::

    checkpoint ──► Engine ┐
    tasks ──► Questions ──┴──► Answers, and blind ones ──► OUTPUT/answers/TASK[_blind].jsonl
                                                           OUTPUT/results.json, report.png
"""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from owl2 import __version__
from owl2.errors import InputError
from owl2.eval.answering import Answer, answer_all, decoding_of
from owl2.eval.progress import Watch
from owl2.eval.report import draw_answers, results_table
from owl2.eval.tasks import Question, Task, find_tasks, full_prompt, without_pictures
from owl2.files import write_whole
from owl2.inference.engine import Engine

PACKAGES = ("torch", "transformers", "pillow")


@dataclass(frozen=True)
class Settings:
    """What `owl2 eval` was asked for.

    Attributes:
        model: a directory or a hub id.
        tasks: names, separated by commas.
        limit: only the first so many questions of each task.
        blind: ask the same without the picture, too.
        prompt: instead of the task's own: with `{question}` in it, or "short".
    """

    model: str
    tasks: str
    output: Path
    batch_size: int = 128
    limit: int | None = None
    blind: bool = True
    prompt: str | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class _Round:
    """All answers to a task's questions, with the pictures or blind."""

    answers: list[Answer]
    seconds: float

    def accuracy(self, kind: str | None = None) -> float:
        right = [a.is_right for a in self.answers if kind in (None, a.question.kind)]
        return sum(right) / len(right)


def evaluate(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Ask, score, and write what came of it; returns what is in ``results.json``.

    Files of an earlier evaluation in `output` are replaced only when all answers are there. Until
    then they are in ``answers/NAME.part.jsonl``.

    Raises:
        InputError: an unknown task, a dataset that is not installed, no checkpoint, an `output`
            that is a file, settings out of their range; whatever `Engine.batch` objects to.
    """
    console = console or Console()
    tasks = find_tasks(settings.tasks)
    if settings.batch_size < 1 or (settings.limit is not None and settings.limit < 1):
        raise InputError("batch_size and limit must be 1 or more.")
    prompts = {task.name: full_prompt(task, settings.prompt) for task in tasks}
    questions = {task.name: task.read(prompts[task.name])[: settings.limit] for task in tasks}
    _check_output(settings.output)
    engine = Engine.from_pretrained(settings.model, settings.device, settings.dtype)

    folder = _make_folder(settings.output)  # not before: a wrong name would leave it empty
    results: dict[str, Any] = {"model": settings.model, "tasks": {}}
    rounds: dict[str, _Round] = {}
    try:
        for task in tasks:
            rounds |= _ask(engine, task, questions[task.name], settings, folder, console)
            results["tasks"][task.name] = {
                **_scores(rounds[task.name], rounds.get(_blind(task.name))),
                "prompt": prompts[task.name],
                **_circumstances(engine, task, settings),
            }
    except KeyboardInterrupt:
        _say(console, f"\nStopped; the answers so far are in {_part(folder, '*')}")
        raise
    _write(settings.output, folder, rounds, results)
    _show(settings.output, tasks, rounds, results, console)
    return results


def _check_output(output: Path) -> None:
    in_the_way = next((path for path in (output, *output.parents) if path.is_file()), None)
    if in_the_way is not None:
        raise InputError(
            f"The results cannot be written to {output}: {in_the_way} is a file; move it away."
        )


def _make_folder(output: Path) -> Path:
    folder = output / "answers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}.") from error
    return folder


def _ask(
    engine: Engine,
    task: Task,
    questions: Sequence[Question],
    settings: Settings,
    folder: Path,
    console: Console,
) -> dict[str, _Round]:
    """The task's rounds by the names of their files."""
    todo = {task.name: list(questions)}
    if settings.blind:
        todo[_blind(task.name)] = [
            replace(question, messages=without_pictures(question.messages))
            for question in questions
        ]
    rounds = {}
    width = max(map(len, todo))
    for name, asked in todo.items():
        part = _part(folder, name)
        with Watch(console, name.ljust(width), len(asked)) as watch:
            answers = answer_all(engine, task, asked, settings.batch_size, watch, part)
            rounds[name] = _Round(answers, watch.seconds)
    return rounds


def _scores(plain: _Round, blind: _Round | None) -> dict[str, Any]:
    def metrics(kind: str | None = None) -> dict[str, float]:
        scores = {"accuracy": plain.accuracy(kind)}
        return scores if blind is None else scores | {"accuracy_blind": blind.accuracy(kind)}

    kinds = [answer.question.kind for answer in plain.answers]
    seconds = {"seconds": plain.seconds}
    if blind is not None:
        seconds["seconds_blind"] = blind.seconds
    return {
        "metrics": metrics(),
        "n": len(kinds),
        "by_answer_kind": {k: {"n": kinds.count(k), **metrics(k)} for k in sorted(set(kinds))},
        **seconds,
        "samples_per_second": len(kinds) / plain.seconds,
    }


def _circumstances(engine: Engine, task: Task, settings: Settings) -> dict[str, Any]:
    """What else has to be the same for the same scores."""
    processor, model = engine.processor, engine.model
    pictures = processor.image_processor
    return {
        "limit": settings.limit,
        "preprocessing": {
            "size": pictures.size,
            "policy": pictures.policy,
            "mean": list(pictures.image_mean),
            "std": list(pictures.image_std),
            "tokens_per_picture": processor.num_image_tokens,
        },
        "decoding": {
            **decoding_of(task),
            "batch_size": settings.batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.config._attn_implementation,
        },
        "scorer": task.scorer.to_dict(),
        "versions": {
            "owl2": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "threads": torch.get_num_threads(),
    }


def _write(output: Path, folder: Path, rounds: dict[str, _Round], results: dict[str, Any]) -> None:
    for name, done in rounds.items():
        lines = "".join(answer.to_json() + "\n" for answer in done.answers)
        write_whole(folder / f"{name}.jsonl", lines)
        _part(folder, name).unlink()
    for name in map(_blind, results["tasks"]):
        if name not in rounds:  # those of an earlier evaluation do not belong to these scores
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
            _part(folder, name).unlink(missing_ok=True)
    write_whole(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _show(
    output: Path,
    tasks: Sequence[Task],
    rounds: dict[str, _Round],
    results: dict[str, Any],
    console: Console,
) -> None:
    for number, task in enumerate(tasks):
        result = results["tasks"][task.name]
        console.print(results_table(task.name, result))
        seconds = result["seconds"] + result.get("seconds_blind", 0.0)
        _say(console, f"{seconds:.0f} s, {result['samples_per_second']:.0f} questions/s")
        path = output / ("report.png" if len(tasks) == 1 else f"report_{task.name}.png")
        title = f"{task.name}: {result['metrics']['accuracy']:.2%} of {result['n']:,} right"
        if draw_answers(path, rounds[task.name].answers, title):
            _say(console, f"examples: {path}")
        elif number == 0:
            hint = "No report.png: matplotlib is missing (pip install 'mplug-owl2[plot]')"
            _say(console, hint)
    _say(console, f"scores: {output / 'results.json'}, every answer: {output / 'answers'}")


def _blind(name: str) -> str:
    return f"{name}_blind"


def _part(folder: Path, name: str) -> Path:
    return folder / f"{name}.part.jsonl"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
