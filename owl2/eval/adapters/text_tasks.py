"""The text benchmarks: tasks of lm-eval with samples of the readers.

::

    samples ──metadata: rows with the columns of the hub──► a dataset in memory ┐
    YAML of the task in lm-eval: prompt, options, filters, metrics ─────────────┴──► lm-eval
    ──► responses: its prompt, the selected or generated text, metadata["scores"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import EvalData
from owl2.eval.samples import EvalSample, Response
from owl2.eval.tasks import EvalTask

FILTERS = {"bbh": "flexible-extract"}  # the filter to use, of tasks with several


def run_lm_eval(
    task: EvalTask, data: EvalData, samples: Sequence[EvalSample], engine: Engine, batch_size: int
) -> list[Response]:
    """The responses and scores of lm-eval for a task with `TaskConfig.lm_eval`.

    Args:
        data: Also contains the few-shot examples.
        samples: All or some of those that `EvalTask.read` returned.
        batch_size: Prompts per batch; the responses do not depend on it, except for rounding.

    Returns:
        Responses in the order of the samples. The text is the selected option, or the generated
        text; the prompt includes the examples. ``metadata["scores"]`` of their samples are the
        scores by the names of lm-eval (``acc``, ``exact_match``), which `task.metric` averages.

    Raises:
        InputError: lm-eval is not installed, or does not have a category; the file with the
            examples is missing.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from owl2.eval.adapters.lm_eval_model import LmEvalModel, quiet
    except ModuleNotFoundError as error:
        raise InputError(
            f"The text benchmarks need {error.name}: pip install 'owl2-vlm[eval]'",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    file, num_fewshot = str(task.config.lm_eval), task.config.num_fewshot
    examples: list[EvalSample] = []
    if num_fewshot:
        patterns = data.published.files[1:]
        published = data.published.model_copy(update={"files": patterns})
        examples, _ = task.read(replace(data, published=published))  # shares the list `files`
    groups: dict[str, list[EvalSample]] = {}
    for sample in samples:
        groups.setdefault(file.format(category=sample.category), []).append(sample)
    configs, by_name = [], {}
    for path, group in groups.items():
        shown = [item for item in examples if file.format(category=item.category) == path]
        config = _task_config(path, group, shown, num_fewshot)
        configs.append(config)
        by_name[config["task"]] = group
    manager = TaskManager(include_defaults=False)
    # By default lm-eval uses the dtype of the logits: in bfloat16 many options would be tied.
    model = LmEvalModel(engine, batch_size=batch_size, softmax_dtype="float32")
    with quiet():
        results = simple_evaluate(
            model,
            tasks=list(manager.load(configs)["tasks"].values()),
            task_manager=manager,
            num_fewshot=num_fewshot or None,
            bootstrap_iters=0,
        )
    responses = {
        group[record["doc_id"]].id: _response(group[record["doc_id"]], record)
        for name, group in by_name.items()
        for record in results["samples"][name]
        if FILTERS.get(task.name) in (None, record["filter"])
    }
    return [responses[sample.id] for sample in samples]


def _task_config(
    file: str, samples: Sequence[EvalSample], examples: Sequence[EvalSample], num_fewshot: int
) -> dict[str, Any]:
    """The configuration of a task of lm-eval with these samples instead of those of the hub.

    Raises:
        InputError: The file does not exist, or there are too few examples.
    """
    import lm_eval
    from datasets import Dataset

    # Private, so the version of lm-eval is pinned: the public function loads data from the hub.
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(str(lm_eval.__file__)).parent / "tasks" / file
    if not path.is_file():
        raise InputError(
            f"lm-eval has no task {path.stem!r}. The directory must contain only files of the "
            "benchmark.",
            ErrorCode.UNKNOWN_NAME,
        )
    if len(examples) < num_fewshot:
        raise InputError(
            f"{path.stem} has {len(examples)} few-shot examples; {num_fewshot} are required.",
            ErrorCode.INVALID_VALUE,
        )
    config: dict[str, Any] = load_yaml(path)
    for key in ("training_split", "validation_split", "tag", "task_alias"):
        config.pop(key, None)
    splits = {"test": samples, **({"dev": examples} if examples else {})}
    rows = {name: [dict(item.metadata) for item in split] for name, split in splits.items()}
    datasets = {name: Dataset.from_list(split) for name, split in rows.items()}
    config |= {"dataset_name": None, "test_split": "test", "custom_dataset": lambda **_: datasets}
    return config


def _response(sample: EvalSample, record: Mapping[str, Any]) -> Response:
    requests = record["arguments"]  # of each request: (prompt, option), or (prompt, settings)
    if isinstance(record["filtered_resps"][0], str):
        text = record["filtered_resps"][0]
    else:
        # (log-likelihood, is greedy) of each option; the most likely one is selected.
        likelihoods = [float(option[0]) for option in record["filtered_resps"]]
        text = str(requests[likelihoods.index(max(likelihoods))][1]).strip()
    scores = {name: float(record[name]) for name in record["metrics"]}
    scored = replace(sample, metadata={**sample.metadata, "scores": scores})
    return Response(scored, str(requests[0][0]), text)
