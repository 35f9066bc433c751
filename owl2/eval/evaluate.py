"""An evaluation, from the names of tasks to ``results.json`` and a report.

::

    checkpoint ──► Engine ┐
    tasks ──► TaskRuns ───┴──generate──► OUTPUT/responses/NAME.part-RANK.jsonl
    all parts ──collect, score──► OUTPUT/responses/NAME.jsonl, results.json, report.md, report.html
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from owl2.checkpoints.adapters import has_adapter
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.eval.conditions import SEED, environment, evaluation_conditions
from owl2.eval.fingerprints import model_fingerprint
from owl2.eval.judge import judge_run
from owl2.eval.openai_client import ChatEndpoint
from owl2.eval.rater import Rater
from owl2.eval.report import (
    format_value,
    has_matplotlib,
    load_results,
    plot_examples,
    results_table,
    text_table,
    write_report,
)
from owl2.eval.results import task_result, write_responses
from owl2.eval.samples import NO_IMAGE, limit_samples
from owl2.eval.task_run import TaskRun, chat_format
from owl2.eval.tasks import find_tasks
from owl2.files import atomic_write_text, require_writable
from owl2.model.variants import as_no_mam
from owl2.scoring.comparison import anchor_images
from owl2.scoring.methods import check_answers
from owl2.sharded_jsonl import ShardedJsonl, remove_parts, to_json
from owl2.workers import WorkerRank, heartbeat


@dataclass(frozen=True)
class EvalConfig:
    """The options of `owl2 eval`.

    Attributes:
        model_args: The checkpoint. Its `image_policy` replaces that of the tasks.
        tasks: Names of tasks and files with custom questions, separated by commas.
        suite: All tasks of a suite, in addition to `tasks`.
        data: The directory with the published files.
        limit: Evaluate only this number of samples of each task, from all categories.
        no_image_baseline: Evaluate the same questions without images as well.
        prompts: "authors": the prompts and the chat format of the tasks. "plain": the plain prompts
            of the tasks in the chat format of the checkpoint.
        prompt: Replaces the prompts of the tasks; contains `{question}`, or is "short".
        max_new_tokens: Replaces that of the tasks, see `EvalTask.max_new_tokens`.
        mam: False: use the text weights for images as well. The checkpoint is not changed.
        image_size: Pixels; replaces that of the checkpoint.
        method: Of a scoring model, see `ImageScorer.from_pretrained`.
        anchors: A folder with the anchor images of Compare2Score.
        judge: None: tasks that need a judge are scored later by `owl2 eval judge`.
    """

    model_args: ModelArgs
    output: Path
    tasks: str | None = None
    suite: str | None = None
    data: Path | None = None
    batch_size: int = 128
    limit: int | None = None
    no_image_baseline: bool = False
    prompts: Literal["authors", "plain"] = "authors"
    prompt: str | None = None
    max_new_tokens: int | None = None
    mam: bool = True
    image_size: int | None = None
    method: str | None = None
    anchors: Path | None = None
    judge: ChatEndpoint | None = None

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
    console = console or Console(quiet=worker.rank > 0, highlight=False)
    runs, skipped = load_task_runs(config)
    for name, reason in skipped.items():
        console.out(f"{name} is skipped: {reason}")
    require_writable(config.responses)
    torch.manual_seed(SEED)
    with heartbeat(config.responses, worker), ExitStack() as stack:
        engine = load_engine(config, worker)
        fingerprint = model_fingerprint(engine.model)
        select_settings = _task_settings(engine, config)
        generated: list[tuple[TaskRun, TaskRun, ShardedJsonl]] = []
        try:
            for main, run in [(one, run) for one in runs for run in one.passes]:
                if main.name in skipped:  # then there is no baseline either
                    continue
                with _skip_on_error(run, skipped, console):
                    if run is main:
                        select_settings(main)
                        main.conditions = evaluation_conditions(
                            engine, main.task.config.lm_eval is not None, main.generation_kwargs
                        )
                    settings = {**main.conditions, "model": fingerprint}
                    path = config.responses / f"{run.name}.jsonl"
                    cache = stack.enter_context(ShardedJsonl(path, settings, worker))
                    if cache.restarted:
                        console.out(f"{path.stem}: starting over, as the settings have changed")
                    run.generate(engine, cache, config.batch_size, console)
                    generated.append((main, run, cache))
            if worker.rank:
                return {}
            # At the end, so that process 0 does not wait for the others after each task.
            for main, run, cache in generated:
                if main.name not in skipped:
                    with _skip_on_error(run, skipped, console):
                        run.collect(cache)
                        run.score()
        except KeyboardInterrupt:
            parts = config.responses / "*.part-*.jsonl"
            console.out(f"\nStopped. The responses are in {parts}: the command resumes.")
            raise
    scored = [run for run in runs if run.scores is not None]
    if not scored:
        raise _nothing_evaluated(skipped)
    results = {
        "model": config.model_args.model,
        "weights_fingerprint": fingerprint,
        "environment": environment(engine, worker.world_size, config.batch_size),
        "tasks": {run.name: task_result(run) for run in scored},
        "skipped": skipped,
    }
    for run in runs:
        write_responses(run, config.responses)
    atomic_write_text(config.output / "results.json", to_json(results, indent=2) + "\n")
    for _, run, _ in generated:
        if run.scores is not None:  # the next call resumes the others
            remove_parts(config.responses / f"{run.name}.jsonl")
    if config.judge is not None and any(run.task.config.judge for run in scored):
        try:
            judge_run(config.output, config.judge, console)
        except InputError as error:
            console.out(f"Not judged: {error} Run `owl2 eval judge {config.output}` later.")
        results = load_results(config.output)
    _print_results(config, scored, results, console)
    return results


def estimate(config: EvalConfig, console: Console) -> dict[str, dict[str, float]]:
    """Estimate the time of an evaluation, from tokens and a trial of each task; print a table.

    Returns:
        `TaskRun.estimate` of each task.

    Raises:
        InputError: As `evaluate`.
    """
    runs, skipped = load_task_runs(config)
    engine = load_engine(config, WorkerRank.from_environment())
    select_settings, estimates = _task_settings(engine, config), {}
    for run in runs:
        select_settings(run)
        estimates[run.name] = run.estimate(engine, config.batch_size)
    columns = list(estimates[runs[0].name])
    total = {column: sum(one[column] for one in estimates.values()) for column in columns}
    rows = []
    for name, one in (*estimates.items(), ("all", total)):
        *counts, seconds = one.values()
        duration = str(timedelta(seconds=math.ceil(seconds)))
        rows.append((name, *(f"{count:,}" for count in counts), duration))
    title = f"Estimate for {config.model_args.model}"
    table = text_table(title, ("task", *columns), rows[:-1])
    table.add_section()
    table.add_row(*rows[-1])
    console.print(table)
    for name, reason in skipped.items():
        console.out(f"{name} is skipped: {reason}")
    console.out(
        f"Measured with batches of {config.batch_size} on {engine.model.device}. N processes with "
        "a GPU each need 1/N of the time."
    )
    return estimates


def load_task_runs(config: EvalConfig) -> tuple[list[TaskRun], dict[str, str]]:
    """The tasks with data, and the reasons why the others are skipped.

    Raises:
        InputError: A task or suite is unknown, a value is out of range; no task has data.
    """
    if config.batch_size < 1 or (config.limit is not None and config.limit < 1):
        raise InputError("batch_size and limit must be 1 or more.", ErrorCode.INVALID_VALUE)
    runs: list[TaskRun] = []
    skipped: dict[str, str] = {}
    anchors = anchor_images(config.anchors)
    for task in find_tasks(config.tasks, config.suite):
        try:
            data = task.data(config.data, config.prompt, config.prompts)
            rater = Rater.create(task.config, data, config.model_args, config.method, anchors)
            if rater is None:
                check_answers(config.model_args.model, task.config.suite == "document")
            samples, invalid = task.read(data)
        except InputError as error:
            skipped[task.name] = str(error)
            continue
        if not samples:
            first = f" The first: {invalid[0].reason}" if invalid else ""
            skipped[task.name] = f"No sample is valid; {len(invalid)} are invalid.{first}"
            continue
        limited = limit_samples(samples, config.limit)
        limit = config.limit if len(limited) < len(samples) else None
        run = TaskRun(task.name, task, data, limited, invalid, limit, rater=rater)
        if config.no_image_baseline:
            run.add_baseline()
        runs.append(run)
    if not runs:
        raise _nothing_evaluated(skipped)
    return runs, skipped


def load_engine(config: EvalConfig, worker: WorkerRank) -> Engine:
    """The engine with the ablations of the paper; each of several processes uses its own GPU.

    Raises:
        InputError: The checkpoint, device, dtype or policy does not exist; the image size is not a
            multiple of the patch size; the MAM of a LoRA cannot be disabled.
    """
    args = config.model_args.for_worker(worker)
    model, processor = args.load_model(), args.load_processor()
    if not config.mam:
        if has_adapter(model):
            raise InputError(
                f"--no-mam does not work with the LoRA {args.model}. Merge it first with "
                "`owl2 merge`.",
                ErrorCode.UNSUPPORTED,
            )
        model = as_no_mam(model)
    if config.image_size is not None:
        model.set_image_size(config.image_size)
        images = processor.image_processor
        processor.image_processor = images.replace(size=config.image_size)
    return Engine(model, processor, enable_prefix_caching=True)


def _task_settings(engine: Engine, config: EvalConfig) -> Callable[[TaskRun], None]:
    """A function that selects the chat format, the image policy, and the limit or the scorer."""
    processor, images = engine.processor, engine.processor.image_processor
    images.alpha = "drop"  # as the authors' scripts
    own_format, own_policy = chat_format(processor), images.image_policy

    def select(run: TaskRun) -> None:
        run.set_chat_format(processor, own_format)
        # The option, the task and the checkpoint, in this order.
        images.image_policy = (
            config.model_args.image_policy or run.task.config.image_policy or own_policy
        )
        if run.rater is not None:
            run.rater.load(engine)
            return
        default = run.task.max_new_tokens(run.samples, processor.tokenizer)
        for own in run.passes:
            own.max_new_tokens = config.max_new_tokens or default

    return select


@contextmanager
def _skip_on_error(run: TaskRun, skipped: dict[str, str], console: Console) -> Iterator[None]:
    """Add a task or a baseline to `skipped` for an error that other tasks may not have."""
    try:
        yield
    except InputError as error:
        if error.code is ErrorCode.PROCESS_FAILED:
            raise
        skipped[run.name] = str(error)
        console.out(f"{run.name} is skipped: {error}")


def _nothing_evaluated(skipped: dict[str, str]) -> InputError:
    lines = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
    return InputError(f"No task could be evaluated.{lines}", ErrorCode.EMPTY_DATASET)


def _print_results(
    config: EvalConfig, runs: list[TaskRun], results: dict[str, Any], console: Console
) -> None:
    for name, result in results["tasks"].items():
        console.print(results_table(name, result))
        seconds = result["seconds"] + result.get(f"seconds{NO_IMAGE}", 0.0)
        console.out(f"{seconds:.0f} s, {result['samples_per_second'] or 0.0:.0f} questions/s")
        if result["truncated"]:
            limit = result["generation"]["max_new_tokens"]
            console.out(
                f"{result['truncated']} of {result['n']} responses have {limit} tokens, the limit, "
                "and may be incomplete; --max-new-tokens raises it"
            )
        if result["invalid"]["n"]:
            first = result["invalid"]["first"][0]
            count = f"{result['invalid']['n']} invalid samples"
            console.out(f"{count}. The first: {first['id']}: {first['reason']}")
    if not has_matplotlib():
        console.out("No report.png: matplotlib is missing (pip install 'owl2-vlm[plot]')")
    for run in runs if has_matplotlib() else ():
        is_video = run.rater is not None and run.rater.rating.kind == "video"
        if not is_video and any(response.image_digests for response in run.responses):
            path = config.output / ("report.png" if len(runs) == 1 else f"report_{run.name}.png")
            result, main = results["tasks"][run.name], run.task.metric.main
            value = format_value(result["metrics"].get(main), result) or "to be judged"
            plot_examples(path, run.scored, f"{run.name}: {main} {value}, n = {result['n']:,}")
            console.out(f"samples: {path}")
    write_report(config.output)
    scores, report = config.output / "results.json", config.output / "report.html"
    console.out(f"scores: {scores}, report: {report}, responses: {config.responses}")
