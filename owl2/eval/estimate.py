"""``owl2 eval --plan``: how long an evaluation will take, before it is begun.

::

    all questions ──processor──► tokens of prompts, images
    some of them, evenly spread ──Engine, timed──► seconds for each ──► hours for all

The trial's answers are thrown away. Image size, dtype and batch size are those of the evaluation.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.evaluate import Settings, read_tasks
from owl2.eval.generate import answer_or_reason, decoding_of, prompt_of
from owl2.eval.results import Ready
from owl2.eval.samples import Question
from owl2.eval.sharding import Team
from owl2.processing.chat_template import IMAGE_TOKEN

TRIAL = 2  # batches of a task that are answered, the first of which is not timed


@dataclass(frozen=True)
class Cost:
    """Of a task.

    Attributes:
        questions: how often the model is asked: blind, too, if it is asked for.
        prompt_tokens: of all prompts, images' included.
        new_tokens: of all answers, at most.
        seconds: estimated.
    """

    name: str
    questions: int
    images: int
    prompt_tokens: int
    new_tokens: int
    seconds: float


def show_plan(settings: Settings, console: Console) -> list[Cost]:
    """Estimate and print.

    Raises:
        InputError: as `evaluate`.
    """
    ready, skipped = read_tasks(settings)
    engine = settings.subject.load(Team.of(os.environ))
    costs = [cost_of(item, engine, settings) for item in ready]
    table = Table(title=f"What {settings.subject.model} costs here", title_justify="left")
    columns = ("task", "questions", "images", "prompt tokens", "new tokens, at most", "time")
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right")
    for cost in costs:
        table.add_row(*_cells(cost))
    table.add_section()
    table.add_row(*_cells(_sum(costs)))
    console.print(table)
    for name, reason in skipped.items():
        _say(console, f"{name} is left out: {reason}")
    _say(
        console,
        f"Timed with {settings.batch_size} questions at a time on {engine.model.device}; of N "
        "processes with a GPU each, each takes 1/N of it.",
    )
    return costs


def cost_of(ready: Ready, engine: Engine, settings: Settings) -> Cost:
    """What a task costs, from all of its prompts and a timed trial."""
    words = images = 0
    fit: list[Question] = []
    for question in ready.questions:
        try:
            prompt = prompt_of(engine, question)
        except InputError:
            continue  # the evaluation will name it; here it costs nothing
        fit.append(question)
        images += prompt.count(IMAGE_TOKEN)
        text = prompt.replace(IMAGE_TOKEN, "")
        words += len(engine.processor.tokenizer(text, add_special_tokens=True)["input_ids"])
    rounds = 2 if settings.blind and ready.task.recipe.way == "generate" else 1
    each = _seconds_each(ready, fit, engine, settings.batch_size)
    return Cost(
        name=ready.task.name,
        questions=len(fit) * rounds,
        images=images,
        prompt_tokens=words * rounds + images * engine.processor.num_image_tokens,
        new_tokens=len(fit) * rounds * ready.task.recipe.max_new_tokens,
        seconds=len(fit) * rounds * each,
    )


def _seconds_each(
    ready: Ready, questions: Sequence[Question], engine: Engine, batch_size: int
) -> float:
    """Measured on some questions, evenly spread so that long and short ones are among them."""
    count = min(len(questions), TRIAL * batch_size)
    if not count:
        return 0.0
    some = [questions[place * len(questions) // count] for place in range(count)]
    batches = [some[start : start + batch_size] for start in range(0, count, batch_size)]
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        if ready.task.recipe.way == "lm-eval":
            from owl2.eval.adapters.text_tasks import run_text  # imports lm-eval: takes seconds

            run_text(ready.task, ready.source, batch, engine, batch_size)
        else:
            asked = [question.messages for question in batch]
            answer_or_reason(engine, asked, decoding_of(ready.task))
        seconds.append((time.perf_counter() - began) / len(batch))
    return seconds[-1]


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(
        "all",
        sum(cost.questions for cost in costs),
        sum(cost.images for cost in costs),
        sum(cost.prompt_tokens for cost in costs),
        sum(cost.new_tokens for cost in costs),
        sum(cost.seconds for cost in costs),
    )


def _cells(cost: Cost) -> list[str]:
    counts = (cost.questions, cost.images, cost.prompt_tokens, cost.new_tokens)
    return [cost.name, *(f"{n:,}" for n in counts), str(timedelta(seconds=math.ceil(cost.seconds)))]


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
