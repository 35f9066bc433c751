"""The results of a task: its entry in ``results.json``, and its files of responses."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from owl2.eval.fingerprints import file_digest, images_fingerprint, samples_fingerprint
from owl2.eval.image_refs import image_names
from owl2.eval.metrics import SampleScore
from owl2.eval.samples import NO_IMAGE, Response, with_suffix
from owl2.eval.task_run import TaskRun
from owl2.files import atomic_write_text
from owl2.sharded_jsonl import Record, to_json

MAX_LISTED_INVALID = 20  # in results.json; a file next to the responses has all


def task_result(run: TaskRun) -> dict[str, Any]:
    """The entry of the task in ``results.json``."""
    config, metric = run.task.config, run.task.metric
    entry: dict[str, Any] = {"metrics": {}, "n": len(run.responses)}
    if run.categories:
        names = [response.sample.category for response in run.responses]
        entry["per_category"] = {name: {"n": names.count(name)} for name in run.categories}
    for own in run.passes:
        if own.scores is not None:
            suffix = own.name.removeprefix(run.name)
            entry["metrics"] |= with_suffix(own.scores.metrics, suffix)
            for name in run.categories:
                values = own.categories.get(name, {})
                entry["per_category"][name] |= with_suffix(values, suffix)
            entry[f"seconds{suffix}"] = own.seconds
            entry[f"truncated{suffix}"] = own.num_truncated
    files = {run.data.relative_name(path): file_digest(path) for path in run.data.files}
    is_comparable = run.limit is None or config.paper_with_limit
    published = config.published if is_comparable else {}
    paper = config.paper if is_comparable else {}
    if run.rater is not None:
        paper = published.get(run.rater.checkpoint or "", {})
    return {
        **entry,
        "samples_per_second": len(run.responses) / run.seconds if run.seconds else None,
        "limit": run.limit,
        **config.model_dump(
            include={"title", "suite", "scale", "digits", "sources", "num_fewshot"}
        ),
        "note": " ".join(filter(None, (config.note, *run.data.remarks))),
        "paper": paper,
        "published": published,
        "main_metric": metric.main,
        "prompt": run.rater.prompt if run.rater else run.data.prompt,
        "metric": metric.to_dict(),
        "data": {
            "files": files,
            "samples": samples_fingerprint(run.samples),
            "images": images_fingerprint(run.responses),
        },
        "invalid": {
            "n": len(run.invalid),
            "first": [asdict(item) for item in run.invalid[:MAX_LISTED_INVALID]],
        },
        **run.conditions,
    }


def write_responses(run: TaskRun, directory: Path) -> None:
    """Write ``NAME.jsonl``, ``NAME.invalid.jsonl`` and the baseline; remove older files."""
    # The invalid samples of the baseline are those of the task.
    files: dict[str, list[Record]] = {
        f"{run.name}{NO_IMAGE}": [],
        f"{run.name}.invalid": [asdict(item) for item in run.invalid],
    }
    for own in run.passes:
        files[own.name] = [response_row(*pair, directory) for pair in own.scored]
    for name, rows in files.items():
        path = directory / f"{name}.jsonl"
        if rows:
            atomic_write_text(path, "".join(f"{to_json(row)}\n" for row in rows))
        else:
            path.unlink(missing_ok=True)


def response_row(response: Response, score: SampleScore, directory: Path) -> Record:
    """A line of ``responses/NAME.jsonl``, which is enough to score or judge a response again."""
    sample = response.sample
    return {
        "id": sample.id,
        "question": sample.question,
        "category": sample.category,
        "images": image_names(response, directory),
        "prompt": response.prompt,
        "expected": list(sample.expected),
        "metadata": dict(sample.metadata),
        "response": response.text,
        "score": score,
    }
