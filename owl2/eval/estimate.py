"""``owl2 eval --estimate``: the time of an evaluation, before it starts.

::

    all samples ──processor──► tokens of the prompts, images
    evenly spaced samples ──Engine, timed──► seconds per sample ──► time for all

The responses of the trial are discarded. Image size, dtype and batch size are those of the
evaluation.
"""

import math
import time
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console

from owl2.engine.engine import Engine
from owl2.eval.evaluate import EvalConfig, load_engine, load_task_runs
from owl2.eval.report import text_table
from owl2.eval.samples import EvalSample, evenly_spaced
from owl2.eval.task_run import TaskRun, render_prompt
from owl2.processing.chat_template import IMAGE_TOKEN
from owl2.workers import WorkerRank

TRIAL_BATCHES = 2  # per task
COLUMNS = ("task", "questions", "images", "prompt tokens", "new tokens (max)", "time")


class EvalEstimate(NamedTuple):
    """The estimate for one task, or for all.

    Attributes:
        questions: Number of prompts, including those of the baseline without images.
        prompt_tokens: Tokens of all prompts, including those of images.
        new_tokens: Maximum number of generated tokens.
        seconds: Estimated time.
    """

    name: str
    questions: int
    images: int
    prompt_tokens: int
    new_tokens: int
    seconds: float


def estimate(config: EvalConfig, console: Console) -> list[EvalEstimate]:
    """Estimate all tasks and print a table.

    Raises:
        InputError: As `evaluate`.
    """
    runs, skipped = load_task_runs(config)
    engine = load_engine(config, WorkerRank.from_environment())
    estimates = [estimate_task(run, engine, config.batch_size) for run in runs]
    total = [sum(values) for values in zip(*(one[1:] for one in estimates), strict=True)]
    rows = [
        (name, *(f"{count:,}" for count in counts), str(timedelta(seconds=math.ceil(seconds))))
        for name, *counts, seconds in (*estimates, ("all", *total))
    ]
    table = text_table(f"Estimate for {config.model_args.model}", COLUMNS, rows[:-1])
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


def estimate_task(run: TaskRun, engine: Engine, batch_size: int) -> EvalEstimate:
    """Count the tokens of all prompts and time a trial."""
    text_tokens = images = 0
    valid: list[EvalSample] = []
    for sample in run.samples:
        if prompt := render_prompt(engine, sample):  # an invalid sample takes no time
            valid.append(sample)
            images += prompt.count(IMAGE_TOKEN)
            text = prompt.replace(IMAGE_TOKEN, "")
            text_tokens += len(engine.processor.tokenizer(text)["input_ids"])
    trial = replace(run, samples=evenly_spaced(valid, TRIAL_BATCHES * batch_size))
    seconds = 0.0  # for the trial, after a warm-up with its first batch
    for count in (min(batch_size, len(trial.samples)), len(trial.samples)):
        start = time.perf_counter()
        for _ in trial.responses_to(range(count), engine, batch_size):
            pass
        seconds = time.perf_counter() - start
    passes = len(run.passes)
    questions = len(valid) * passes
    return EvalEstimate(
        name=run.name,
        questions=questions,
        images=images,
        prompt_tokens=text_tokens * passes + images * engine.processor.num_image_tokens,
        new_tokens=questions * run.task.config.max_new_tokens,
        seconds=seconds * questions / max(1, len(trial.samples)),
    )
