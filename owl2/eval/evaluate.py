"""A whole evaluation, from names of tasks to ``results.json`` and a report.

::

    checkpoint ──► Engine ┐
    tasks ──► Questions ──┴──► Round, with the images and blind ──► OUTPUT/answers/NAME.part.jsonl
    all parts ──metric──► OUTPUT/answers/NAME.jsonl, results.json, report.md, report.html, plots
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.fingerprints import model_fingerprint
from owl2.eval.generate import Asked, Round
from owl2.eval.heartbeat import beating, forget
from owl2.eval.image_refs import named_images
from owl2.eval.llm_judge import judge_run
from owl2.eval.model_args import Subject
from owl2.eval.plots import draw_answers, has_matplotlib
from owl2.eval.report import results_table, shown, write_report
from owl2.eval.response_cache import Journal, json_text, remove_parts
from owl2.eval.results import (
    BLIND,
    SEED,
    Ready,
    Scored,
    broken_lines,
    facts_of,
    machine_of,
    scores_of,
    settings_of,
)
from owl2.eval.sharding import Team
from owl2.eval.tasks import Task, find_tasks, without_images
from owl2.files import atomic_write_text
from owl2.json_records import json_object
from owl2.processing.image_processing import ImagePolicy


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible endpoint; the key is in the environment (OPENAI_API_KEY)."""

    url: str
    model: str


@dataclass(frozen=True)
class Settings:
    """What `owl2 eval` was asked for.

    Attributes:
        tasks: names, and files of one's own questions, separated by commas.
        suite: all tasks of it, too.
        data: the folder of the benchmarks' own files.
        limit: only the first so many questions of each task.
        blind: ask the same without the image, too.
        prompt: instead of the tasks' own: with `{question}` in it, or "short".
        judge: None: what needs one is left to `owl2 eval judge`.
    """

    subject: Subject
    output: Path
    tasks: str | None = None
    suite: str | None = None
    data: Path | None = None
    batch_size: int = 128
    limit: int | None = None
    blind: bool = False
    prompt: str | None = None
    judge: Judge | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What is known of it once it is loaded: its fingerprint, and how it takes images."""

    fingerprint: str
    policy: ImagePolicy


@dataclass
class _Evaluation:
    """What goes from step to step."""

    settings: Settings
    console: Console
    team: Team
    skipped: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, Round] = field(default_factory=dict)
    circumstances: dict[str, dict[str, Any]] = field(default_factory=dict)
    gathered: dict[str, Asked] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)

    def leave_out(self, task: Task, reason: str) -> None:
        """Say so, and go on with the others."""
        self.scored.pop(task.name, None)
        self.skipped[task.name] = reason
        _say(self.console, f"{task.name} is left out: {reason}")

    @property
    def folder(self) -> Path:
        return self.settings.output / "answers"


def evaluate(
    settings: Settings, console: Console | None = None, team: Team | None = None
) -> dict[str, Any]:
    """Ask, score, and write what came of it; returns what is in ``results.json``.

    Files of an earlier evaluation in `output` are replaced only when all answers are there. Until
    then they are in ``answers/NAME.part.jsonl``, from which the next call with the same settings
    goes on. Of several processes, only the first one returns results; the others' are empty.

    Raises:
        InputError: an unknown task, no checkpoint, an `output` that is a file, settings out of
            their range; nothing could be evaluated, as data is missing or all of it is broken; a
            process died before it had all its answers.
    """
    team = team or Team.of(os.environ)
    console = console or Console(quiet=team.rank > 0)
    ready, skipped = read_tasks(settings)
    for name, reason in skipped.items():
        _say(console, f"{name} is left out: {reason}")
    _check_output(settings.output)
    torch.manual_seed(SEED)
    with beating(settings.output / "answers", team):
        engine = settings.subject.load(team)
        _make_folder(settings.output / "answers")  # not before: a wrong name would leave it empty
        evaluation = _Evaluation(settings, console, team, skipped)
        own = Checkpoint(model_fingerprint(engine.model), engine.processor.image_processor.policy)
        try:
            for item in ready:
                _ask(evaluation, engine, item, own)
            if team.rank:
                return {}
            for round_ in evaluation.rounds.values():
                _score(evaluation, round_)
        except KeyboardInterrupt:
            parts = evaluation.folder / "*.part.jsonl"
            _say(
                console, f"\nStopped; the answers so far are in {parts}: the same command goes on."
            )
            raise
    machine = {**machine_of(engine), "processes": team.size, "batch_size": settings.batch_size}
    results = {
        "model": settings.subject.model,
        "fingerprint": own.fingerprint,
        "machine": machine,
        "tasks": _entries(evaluation, ready),
        "skipped": evaluation.skipped,
    }
    if not results["tasks"]:
        raise InputError(_nothing(evaluation.skipped))
    _write(evaluation, ready, results)
    if settings.judge is not None and any(item.task.recipe.judge for item in ready):
        try:
            judge(settings.output, settings.judge, console)
        except InputError as error:
            _say(console, f"Not judged: {error} `owl2 eval judge {settings.output}` does it later.")
        results = json_object(settings.output / "results.json").value
    _show(evaluation, ready, results)
    return results


def read_tasks(settings: Settings) -> tuple[list[Ready], dict[str, str]]:
    """The tasks whose data is there, with their questions; and why the others are left out.

    Raises:
        InputError: an unknown task or suite, numbers out of their range; no task has its data.
    """
    if settings.batch_size < 1 or (settings.limit is not None and settings.limit < 1):
        raise InputError("batch_size and limit must be 1 or more.")
    ready, skipped = [], {}
    for task in find_tasks(settings.tasks, settings.suite):
        try:
            source = task.source(settings.data, settings.prompt)
            questions, broken = task.read(source)
            _require_some(task, questions, broken)
        except InputError as error:
            skipped[task.name] = str(error)
            continue
        ready.append(Ready(task, source, questions[: settings.limit], broken))
    if not ready:
        raise InputError(_nothing(skipped))
    return ready, skipped


def _require_some(task: Task, questions: list[Any], broken: list[Any]) -> None:
    if not questions:
        first = f". The first: {broken[0].reason}" if broken else "."
        raise InputError(
            f"{task.name} has no question that can be asked, and {len(broken)} broken{first}"
        )


def _nothing(skipped: dict[str, str]) -> str:
    if len(skipped) == 1:
        return next(iter(skipped.values()))
    lines = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
    return f"Nothing could be evaluated.{lines}"


def _check_output(output: Path) -> None:
    in_the_way = next((path for path in (output, *output.parents) if path.is_file()), None)
    if in_the_way is not None:
        raise InputError(
            f"The results cannot be written to {output}: {in_the_way} is a file; move it away."
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}.") from error


def _ask(evaluation: _Evaluation, engine: Engine, ready: Ready, own: Checkpoint) -> None:
    """A task's rounds, into their journals; a task that cannot be asked is left out."""
    settings, task = evaluation.settings, ready.task
    # As asked for, else as the benchmark's recipe says, else as the checkpoint does.
    policy = settings.subject.image_policy or task.recipe.image_policy or own.policy
    engine.processor.image_processor.policy = policy
    made = settings_of(engine, task)
    evaluation.circumstances[task.name] = made
    try:
        for name, questions in _rounds(ready, settings.blind):
            journal = Journal(
                evaluation.folder, name, {**made, "model": own.fingerprint}, evaluation.team
            )
            if journal.began_anew:
                _say(evaluation.console, f"{name}: earlier answers are of other settings; anew")
            round_ = Round(name, task, ready.source, questions, journal)
            round_.ask(engine, settings.batch_size, evaluation.team, evaluation.console)
            evaluation.rounds[name] = round_
    except InputError as error:
        evaluation.rounds.pop(task.name, None)
        evaluation.leave_out(task, str(error))


def _rounds(ready: Ready, blind: bool) -> Iterator[tuple[str, list[Any]]]:
    yield ready.task.name, ready.questions
    if blind and ready.task.recipe.way == "generate":  # text has no images to take away
        yield (
            f"{ready.task.name}{BLIND}",
            [replace(q, messages=without_images(q.messages)) for q in ready.questions],
        )


def _score(evaluation: _Evaluation, round_: Round) -> None:
    """What came of a round, once all processes have answered; scored, if there is an answer."""
    name, task = round_.name, round_.task
    asked = evaluation.gathered[name] = round_.gather()
    try:
        if not asked.answers:
            raise InputError(
                f"none of its {len(asked.broken)} questions could be asked; the first: "
                f"{asked.broken[0].reason}"
            )
        evaluation.scored[name] = Scored.of(task.metric, asked)
    except InputError as error:
        if name == task.name:
            evaluation.leave_out(task, str(error))
        else:
            _say(evaluation.console, f"{task.name} has no blind scores: {error}")


def _entries(evaluation: _Evaluation, ready: list[Ready]) -> dict[str, Any]:
    """Of each task that has scores."""
    scored = evaluation.scored
    return {
        item.task.name: {
            **scores_of(own, scored.get(f"{item.task.name}{BLIND}")),
            "limit": evaluation.settings.limit,
            **facts_of(item, own.asked),
            **evaluation.circumstances[item.task.name],
        }
        for item in ready
        if (own := scored.get(item.task.name)) is not None
    }


def _write(evaluation: _Evaluation, ready: list[Ready], results: dict[str, Any]) -> None:
    """The answers, what could not be asked, and the results; then the parts are not needed."""
    folder, scored = evaluation.folder, evaluation.scored
    for item in ready:
        name = item.task.name
        for own in (name, f"{name}{BLIND}"):
            lines = ""
            if own in scored:
                lines = scored[own].lines(named_images(scored[own].asked, folder))
            _write_or_remove(folder / f"{own}.jsonl", lines)
        asked = evaluation.gathered.get(name)
        broken = [*item.broken, *(asked.broken if asked else [])]
        _write_or_remove(folder / f"{name}.broken.jsonl", broken_lines(broken))
    path = evaluation.settings.output / "results.json"
    atomic_write_text(path, json_text(results, indent=2) + "\n")
    for item in ready:
        for own in (item.task.name, f"{item.task.name}{BLIND}"):
            remove_parts(folder, own)
    forget(folder)


def _write_or_remove(path: Path, text: str) -> None:
    """Without a text, that of an earlier evaluation does not belong to these scores either."""
    if text:
        atomic_write_text(path, text)
    else:
        path.unlink(missing_ok=True)


def judge(output: Path, judge: Judge, console: Console) -> None:
    """Have the answers judged that need it, and write the report anew.

    Raises:
        InputError: as `judge_run`; or not one of the answers that were still to be judged was.
    """
    done = judge_run(output, judge.url, judge.model, lambda line: _say(console, line))
    write_report(output)
    failed = {
        f"{name}, {key}": why for name, one in done.items() for key, why in one.failed.items()
    }
    if failed and not any(one.new for one in done.values()):
        first, why = next(iter(failed.items()))
        raise InputError(
            f"No answer could be judged: {len(failed)} failed. The first: {first}: {why}. The same "
            "command asks again."
        )


def _show(evaluation: _Evaluation, ready: list[Ready], results: dict[str, Any]) -> None:
    console, output = evaluation.console, evaluation.settings.output
    for name, result in results["tasks"].items():
        console.print(results_table(name, result))
        seconds = result["seconds"] + result.get("seconds_blind", 0.0)
        speed = result["samples_per_second"] or 0.0
        _say(console, f"{seconds:.0f} s, {speed:.0f} questions/s")
        if result["broken"]["n"]:
            first = result["broken"]["first"][0]
            left = f"{result['broken']['n']} could not be asked; the first: {first['id']}: "
            _say(console, left + first["reason"])
    if has_matplotlib():
        for item in ready:
            scored = evaluation.scored.get(item.task.name)
            if scored is not None and any(scored.asked.images):
                _say(console, f"examples: {_draw(output, item, scored, results)}")
    else:
        _say(console, "No report.png: matplotlib is missing (pip install 'owl2-vlm[plot]')")
    write_report(output)
    _say(
        console,
        f"scores: {output / 'results.json'}, report: {output / 'report.html'}, every answer: "
        f"{evaluation.folder}",
    )


def _draw(output: Path, item: Ready, scored: Scored, results: dict[str, Any]) -> Path:
    name, main = item.task.name, item.task.metric.main
    path = output / ("report.png" if len(results["tasks"]) == 1 else f"report_{name}.png")
    result = results["tasks"][name]
    value = result["metrics"].get(main)
    figure = "to be judged" if value is None else shown(value, result)
    draw_answers(path, scored.pairs, f"{name}: {main} {figure}, n = {result['n']:,}")
    return path


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
