"""``owl2 eval --estimate``: the time of an evaluation, before it starts.

::

    all samples ──processor──► tokens of the prompts, images
    evenly spaced samples ──Engine, timed──► seconds per sample ──► time for all

The responses of the trial are discarded. Image size, dtype and batch size are those of the
evaluation.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from owl2.engine.engine import Engine
from owl2.engine.error_isolation import batch_or_errors
from owl2.errors import InputError
from owl2.eval.evaluate import EvalConfig, load_task_runs, print_line
from owl2.eval.samples import EvalSample
from owl2.eval.task_run import TaskRun, render_prompt
from owl2.processing.chat_template import IMAGE_TOKEN
from owl2.workers import WorkerRank

TRIAL_BATCHES = 2  # per task; the first one is a warm-up
COLUMNS = ("task", "questions", "images", "prompt tokens", "new tokens (max)", "time")


@dataclass(frozen=True)
class EvalEstimate:
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

    def cells(self) -> list[str]:
        """The row of the table with the head `COLUMNS`."""
        counts = (self.questions, self.images, self.prompt_tokens, self.new_tokens)
        duration = timedelta(seconds=math.ceil(self.seconds))
        return [self.name, *(f"{count:,}" for count in counts), str(duration)]


def estimate(config: EvalConfig, console: Console) -> list[EvalEstimate]:
    """Estimate all tasks and print a table.

    Raises:
        InputError: As `evaluate`.
    """
    runs, skipped = load_task_runs(config)
    engine = config.model_args.load(WorkerRank.from_environment())
    estimates = [estimate_task(run, engine, config.batch_size) for run in runs]
    table = Table(title=f"Estimate for {config.model_args.model}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "task" else "right")
    for one in estimates:
        table.add_row(*one.cells())
    table.add_section()
    total = EvalEstimate(
        "all",
        sum(one.questions for one in estimates),
        sum(one.images for one in estimates),
        sum(one.prompt_tokens for one in estimates),
        sum(one.new_tokens for one in estimates),
        sum(one.seconds for one in estimates),
    )
    table.add_row(*total.cells())
    console.print(table)
    for name, reason in skipped.items():
        print_line(console, f"{name} is skipped: {reason}")
    print_line(
        console,
        f"Measured with batches of {config.batch_size} on {engine.model.device}. N processes with "
        "a GPU each need 1/N of the time.",
    )
    return estimates


def estimate_task(run: TaskRun, engine: Engine, batch_size: int) -> EvalEstimate:
    """Count the tokens of all prompts and time a trial."""
    text_tokens = images = 0
    valid: list[EvalSample] = []
    for sample in run.samples:
        try:
            prompt = render_prompt(engine, sample)
        except InputError:
            continue  # the evaluation reports it; it takes no time
        valid.append(sample)
        images += prompt.count(IMAGE_TOKEN)
        text = prompt.replace(IMAGE_TOKEN, "")
        text_tokens += len(engine.processor.tokenizer(text, add_special_tokens=True)["input_ids"])
    passes = len(run.passes)
    return EvalEstimate(
        name=run.name,
        questions=len(valid) * passes,
        images=images,
        prompt_tokens=text_tokens * passes + images * engine.processor.num_image_tokens,
        new_tokens=len(valid) * passes * run.task.config.max_new_tokens,
        seconds=len(valid) * passes * _seconds_per_sample(run, valid, engine, batch_size),
    )


def _seconds_per_sample(
    run: TaskRun, samples: Sequence[EvalSample], engine: Engine, batch_size: int
) -> float:
    count = min(len(samples), TRIAL_BATCHES * batch_size)
    if not count:
        return 0.0
    trial = [samples[index * len(samples) // count] for index in range(count)]
    seconds = 0.0
    for start in range(0, count, batch_size):
        batch = trial[start : start + batch_size]
        begin = time.perf_counter()
        if run.task.config.engine == "lm-eval":
            from owl2.eval.adapters.text_tasks import run_lm_eval  # importing takes seconds

            run_lm_eval(run.task, run.data, batch, engine, batch_size)
        else:
            conversations = [sample.messages for sample in batch]
            batch_or_errors(engine, conversations, **run.generation_kwargs)
        seconds = (time.perf_counter() - begin) / len(batch)
    return seconds
