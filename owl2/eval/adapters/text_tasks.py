"""The text benchmarks: lm-eval's own tasks, over questions that our readers got from files.

::

    Questions ──facts: the row in the hub's columns──► a data set in memory ┐
    lm-eval's YAML of the task: its words, options, filters, metrics ───────┴──► lm-eval
    ──► Answers: its prompt, what was chosen or written, facts["scores"]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.readers import Source, sorted_out
from owl2.eval.samples import Answer, Question
from owl2.eval.tasks import Task


@dataclass(frozen=True)
class _Suite:
    """Where lm-eval has a task.

    Attributes:
        file: its YAML below lm-eval's ``tasks/``, of a question's kind: a group has one a part.
        answers: which of its filters to take, where it has several.
    """

    file: Callable[[str], str]
    answers: str | None = None


def _one(file: str) -> Callable[[str], str]:
    return lambda _: file


_SUITES = {
    "mmlu": _Suite(lambda subject: f"mmlu/default/mmlu_{subject}.yaml"),
    "bbh": _Suite(lambda task: f"bbh/zeroshot/{task}.yaml", answers="flexible-extract"),
    "agieval": _Suite(lambda name: f"agieval/{name}.yaml"),
    "arc_c": _Suite(_one("arc/arc_challenge.yaml")),
    "arc_e": _Suite(_one("arc/arc_easy.yaml")),
    "boolq": _Suite(_one("super_glue/boolq/default.yaml")),
    "triviaqa": _Suite(_one("triviaqa/default.yaml")),
    "hellaswag": _Suite(_one("hellaswag/hellaswag.yaml")),
}


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
        InputError: lm-eval is not installed; it has no such part of a task.
        MissingData: the file with the examples is not there.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from owl2.eval.adapters.lm_eval_model import Owl2Text, quiet
    except ModuleNotFoundError as error:
        raise InputError(
            f"The text benchmarks need {error.name}: pip install 'owl2-vlm[eval]'"
        ) from error
    suite = _SUITES[task.name]
    examples = _examples(task, source)
    parts: dict[str, list[Question]] = {}
    for question in questions:
        parts.setdefault(suite.file(question.kind), []).append(question)
    manager = TaskManager(include_defaults=False)
    answered: dict[str, Answer] = {}
    names = {}
    configs = []
    for file, some in parts.items():
        shown = [row.facts for row in examples if suite.file(row.kind) == file]
        config = _config(file, [question.facts for question in some], shown, task.recipe.shots)
        names[config["task"]] = some
        configs.append(config)
    # lm-eval's default is the logits' own dtype: in bfloat16 many options would be equally likely,
    # and the first of them chosen.
    model = Owl2Text(engine, batch_size=batch_size, softmax_dtype="float32")
    with quiet():
        results = simple_evaluate(
            model,
            tasks=list(manager.load(configs)["tasks"].values()),
            task_manager=manager,
            num_fewshot=task.recipe.shots or None,
            bootstrap_iters=0,
        )
    for name, some in names.items():
        for sample in results["samples"][name]:
            if suite.answers in (None, sample["filter"]):
                question = some[sample["doc_id"]]
                answered[question.id] = _answer(question, sample)
    return [answered[question.id] for question in questions]


def _examples(task: Task, source: Source) -> list[Question]:
    if not task.recipe.shots:
        return []
    dev = replace(source, options={**source.options, "split": "dev"})  # shares the list `read`
    return sorted_out(task.reader(dev))[0]


def _config(
    file: str,
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    shots: int,
) -> dict[str, Any]:
    """lm-eval's configuration of a task, with these rows instead of the hub's.

    Raises:
        InputError: there is no such file, or there are too few examples.
    """
    import lm_eval
    from datasets import Dataset

    # Not public, and so lm-eval's version is fixed: the public way loads the hub's data at once.
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(str(lm_eval.__file__)).parent / "tasks" / file
    if not path.is_file():
        raise InputError(
            f"lm-eval has no task {path.stem!r}; are all files in the folder the benchmark's own?"
        )
    if len(examples) < shots:
        raise InputError(f"{path.stem} has {len(examples)} examples; {shots} are to be shown.")
    config: dict[str, Any] = load_yaml(path)
    for split in ("training_split", "validation_split", "tag", "task_alias"):
        config.pop(split, None)
    data = {"test": Dataset.from_list([dict(row) for row in rows])}
    if examples:
        data["dev"] = Dataset.from_list([dict(row) for row in examples])
    config |= {"dataset_name": None, "test_split": "test", "custom_dataset": lambda **_: data}
    return config


def _answer(question: Question, sample: Mapping[str, Any]) -> Answer:
    """lm-eval's record of a question → an answer."""
    asked = sample["arguments"]  # of each request: (prompt, option), or (prompt, settings)
    if isinstance(sample["filtered_resps"][0], str):
        text = sample["filtered_resps"][0]
    else:
        # (log-likelihood, greedy) of each option; the likeliest is what was chosen.
        likelihoods = [float(option[0]) for option in sample["filtered_resps"]]
        best = likelihoods.index(max(likelihoods))
        text = str(asked[best][1]).strip()
    scores = {name: float(sample[name]) for name in sample["metrics"]}
    judged = replace(question, facts={**question.facts, "scores": scores})
    return Answer(judged, str(asked[0][0]), text)
