"""An evaluation, from the names of tasks to ``results.json`` and a report.

::

    checkpoint ──► Engine ┐
    tasks ──► TaskRuns ───┴──generate──► OUTPUT/responses/NAME.part-RANK.jsonl
    all parts ──collect, score──► OUTPUT/responses/NAME.jsonl, results.json, report.md, report.html
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval.fingerprints import model_fingerprint
from owl2.eval.llm_judge import judge_run
from owl2.eval.model_args import EvalModelArgs
from owl2.eval.plots import has_matplotlib, plot_examples
from owl2.eval.report import format_value, results_table, write_report
from owl2.eval.samples import NO_IMAGE
from owl2.eval.task_run import SEED, TaskRun, evaluation_conditions
from owl2.eval.tasks import find_tasks
from owl2.files import atomic_write_text
from owl2.json_records import json_object
from owl2.sharded_jsonl import ShardedJsonl, to_json
from owl2.workers import WorkerRank, heartbeat, remove_heartbeats


@dataclass(frozen=True)
class JudgeConfig:
    """An OpenAI-compatible endpoint; its key is in the environment (OPENAI_API_KEY)."""

    url: str
    model: str


@dataclass(frozen=True)
class EvalConfig:
    """The options of `owl2 eval`.

    Attributes:
        tasks: Names of tasks and files with custom questions, separated by commas.
        suite: All tasks of a suite, in addition to `tasks`.
        data: The directory with the published files.
        limit: Evaluate only the first samples of each task.
        no_image_baseline: Evaluate the same questions without images as well.
        prompt: Replaces the prompts of the tasks; contains `{question}`, or is "short".
        judge: None: tasks that need a judge are scored later by `owl2 eval judge`.
    """

    model_args: EvalModelArgs
    output: Path
    tasks: str | None = None
    suite: str | None = None
    data: Path | None = None
    batch_size: int = 128
    limit: int | None = None
    no_image_baseline: bool = False
    prompt: str | None = None
    judge: JudgeConfig | None = None

    @property
    def responses(self) -> Path:
        """The directory with the responses."""
        return self.output / "responses"


def evaluate(
    config: EvalConfig, console: Console | None = None, worker: WorkerRank | None = None
) -> dict[str, Any]:
    """Generate responses, score them, and write the results; returns ``results.json``.

    Files of an earlier evaluation in `output` are replaced when all responses exist. Until then the
    responses are in ``responses/NAME.part-RANK.jsonl``, from which the same call resumes. Only
    process 0 returns results; the others return an empty dictionary.

    Raises:
        InputError: A task or the checkpoint does not exist, a value is out of range, `output` is a
            file; no task has data and valid samples; a process died before its responses existed.
    """
    worker = worker or WorkerRank.from_environment()
    console = console or Console(quiet=worker.rank > 0)
    runs, skipped = load_task_runs(config)
    for name, reason in skipped.items():
        print_line(console, f"{name} is skipped: {reason}")
    _check_output(config.output)
    torch.manual_seed(SEED)
    with heartbeat(config.responses, worker), ExitStack() as caches:
        engine = config.model_args.load(worker)
        fingerprint = model_fingerprint(engine.model)
        policy = engine.processor.image_processor.policy
        try:
            for run in runs:
                # The option, the task and the checkpoint, in this order, select the policy.
                engine.processor.image_processor.policy = (
                    config.model_args.image_policy or run.task.config.image_policy or policy
                )
                try:
                    _generate(config, run, engine, fingerprint, worker, console, caches)
                except InputError as error:
                    _skip(run, skipped, error, console)
            if worker.rank:
                return {}
            for run in runs:
                if run.name not in skipped:
                    _score(run, skipped, console)
        except KeyboardInterrupt:
            parts = config.responses / "*.part-*.jsonl"
            print_line(console, f"\nStopped. The responses are in {parts}: the command resumes.")
            raise
        scored = [run for run in runs if run.name not in skipped]
        results = {
            "model": config.model_args.model,
            "weights_fingerprint": fingerprint,
            "environment": _environment(engine, config, worker),
            "tasks": {run.name: run.result(config.limit) for run in scored},
            "skipped": skipped,
        }
        if not scored:
            raise _nothing_evaluated(skipped)
        for run in runs:
            run.write(config.responses)
        atomic_write_text(config.output / "results.json", to_json(results, indent=2) + "\n")
        for cache in (own.cache for run in runs for own in run.passes):
            if cache is not None:
                cache.remove()
    remove_heartbeats(config.responses)
    if config.judge is not None and any(run.task.config.judge for run in scored):
        try:
            judge(config.output, config.judge, console)
        except InputError as error:
            command = f"owl2 eval judge {config.output}"
            print_line(console, f"Not judged: {error} Run `{command}` later.")
        results = json_object(config.output / "results.json").value
    _print_results(config, scored, results, console)
    return results


def load_task_runs(config: EvalConfig) -> tuple[list[TaskRun], dict[str, str]]:
    """The tasks with data, and the reasons why the others are skipped.

    Raises:
        InputError: A task or suite is unknown, a value is out of range; no task has data.
    """
    if config.batch_size < 1 or (config.limit is not None and config.limit < 1):
        raise InputError("batch_size and limit must be 1 or more.", ErrorCode.INVALID_VALUE)
    runs: list[TaskRun] = []
    skipped: dict[str, str] = {}
    for task in find_tasks(config.tasks, config.suite):
        try:
            data = task.data(config.data, config.prompt)
            samples, invalid = task.read(data)
            if not samples:
                first = f" The first: {invalid[0].reason}" if invalid else ""
                raise InputError(
                    f"{task.name} has no valid samples and {len(invalid)} invalid ones.{first}",
                    ErrorCode.EMPTY_DATASET,
                )
        except InputError as error:
            skipped[task.name] = str(error)
            continue
        run = TaskRun(task.name, task, data, samples[: config.limit], invalid)
        if config.no_image_baseline:
            run.add_baseline()
        runs.append(run)
    if not runs:
        raise _nothing_evaluated(skipped)
    return runs, skipped


def print_line(console: Console, line: str) -> None:
    """Print a line without markup, highlighting and line breaks."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def judge(output: Path, config: JudgeConfig, console: Console) -> None:
    """Judge the responses that need it, and write the report again.

    Raises:
        InputError: As `judge_run`; or all pending responses failed.
    """
    summaries = judge_run(output, config.url, config.model, lambda line: print_line(console, line))
    write_report(output)
    failed = {
        f"{name}, {identifier}": reason
        for name, summary in summaries.items()
        for identifier, reason in summary.failed.items()
    }
    if failed and not any(summary.new for summary in summaries.values()):
        first, reason = next(iter(failed.items()))
        raise InputError(
            f"No response could be judged: {len(failed)} failed. The first: {first}: {reason}. The "
            "same command tries again.",
            ErrorCode.NETWORK,
        )


# ------------------------------------------------------------------ steps


def _check_output(output: Path) -> None:
    file = next((path for path in (output, *output.parents) if path.is_file()), None)
    if file is not None:
        raise InputError(
            f"The results cannot be written to {output}: {file} is a file.", ErrorCode.FILE_EXISTS
        )


def _generate(
    config: EvalConfig,
    run: TaskRun,
    engine: Engine,
    fingerprint: str,
    worker: WorkerRank,
    console: Console,
    caches: ExitStack,
) -> None:
    run.conditions = evaluation_conditions(engine, run)
    settings = {**run.conditions, "model": fingerprint}
    for own in run.passes:
        path = config.responses / f"{own.name}.jsonl"
        cache = caches.enter_context(ShardedJsonl(path, settings, worker))
        if cache.restarted:
            print_line(console, f"{own.name}: earlier responses have other settings; starting over")
        own.generate(engine, cache, config.batch_size, worker, console)


def _score(run: TaskRun, skipped: dict[str, str], console: Console) -> None:
    try:
        run.collect()
        run.score()
    except InputError as error:
        if error.code is ErrorCode.PROCESS_FAILED:
            raise
        _skip(run, skipped, error, console)
    if run.baseline is not None:
        run.baseline.collect()
        try:
            run.baseline.score()
        except InputError as error:
            print_line(console, f"{run.name} has no scores without images: {error}")


def _skip(run: TaskRun, skipped: dict[str, str], error: InputError, console: Console) -> None:
    skipped[run.name] = str(error)
    print_line(console, f"{run.name} is skipped: {error}")


def _nothing_evaluated(skipped: dict[str, str]) -> InputError:
    lines = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
    return InputError(f"No task could be evaluated.{lines}", ErrorCode.EMPTY_DATASET)


def _environment(engine: Engine, config: EvalConfig, worker: WorkerRank) -> dict[str, Any]:
    """Where the evaluation ran; it changes responses only by rounding errors."""
    device = engine.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "processes": worker.world_size,
        "batch_size": config.batch_size,
    }


def _print_results(
    config: EvalConfig, runs: list[TaskRun], results: dict[str, Any], console: Console
) -> None:
    for name, result in results["tasks"].items():
        console.print(results_table(name, result))
        seconds = result["seconds"] + result.get(f"seconds{NO_IMAGE}", 0.0)
        rate = result["samples_per_second"] or 0.0
        print_line(console, f"{seconds:.0f} s, {rate:.0f} questions/s")
        if result["invalid"]["n"]:
            first = result["invalid"]["first"][0]
            count = f"{result['invalid']['n']} invalid samples. The first: "
            print_line(console, f"{count}{first['id']}: {first['reason']}")
    if has_matplotlib():
        for run in runs:
            if any(response.image_digests for response in run.responses):
                file = "report.png" if len(runs) == 1 else f"report_{run.name}.png"
                path, main = config.output / file, run.task.metric.main
                result = results["tasks"][run.name]
                value = result["metrics"].get(main)
                text = "to be judged" if value is None else format_value(value, result)
                title = f"{run.name}: {main} {text}, n = {result['n']:,}"
                plot_examples(path, run.scored, title)
                print_line(console, f"examples: {path}")
    else:
        print_line(console, "No report.png: matplotlib is missing (pip install 'owl2-vlm[plot]')")
    write_report(config.output)
    results_path, report = config.output / "results.json", config.output / "report.html"
    line = f"scores: {results_path}, report: {report}, responses: {config.responses}"
    print_line(console, line)
