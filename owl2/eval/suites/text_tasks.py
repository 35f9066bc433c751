"""The text benchmarks: lm-eval's own tasks, over questions that our readers got from files.

::

    Questions ──facts: the row in the hub's columns──► a data set in memory ┐
    lm-eval's YAML of the task: its words, options, filters, metrics ───────┴──► lm-eval
    ──► Answers: its prompt, what was chosen or written, facts["scores"]
"""

from collections.abc import Sequence

from owl2.eval.questions import Answer, Question
from owl2.eval.readers import Source
from owl2.eval.tasks import Task
from owl2.inference.engine import Engine


def run_text(
    task: Task, source: Source, questions: Sequence[Question], engine: Engine, batch_size: int
) -> list[Answer]:
    """What lm-eval makes of a task whose recipe has ``way: lm-eval``.

    `task.metric` scores the answers like any other task's: each answer's question has lm-eval's own
    scores under ``facts["scores"]``, by lm-eval's names (``acc``, ``exact_match``).

    Args:
        source: as `task.source` gives it; where the examples before a question come from, too.
        questions: as `task.read` gives them; the first so many where there is a limit.
        batch_size: prompts at a time. The answers do not depend on it, as far as rounding goes.

    Returns:
        The answers in the order of the questions. `text` is the option that was chosen, or what
        was written; `prompt` what the model got, examples included.

    Raises:
        InputError: lm-eval is not installed.
        MissingData: the file with the examples is not there.
    """
