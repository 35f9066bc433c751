"""What ``results.json`` and the files of answers hold of a task (DESIGN 4)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from owl2.eval.answering import Asked, decoding_of, picture_names
from owl2.eval.fingerprints import (
    file_fingerprint,
    pictures_fingerprint,
    questions_fingerprint,
    versions,
)
from owl2.eval.metrics import Each, Metric
from owl2.eval.questions import Answer, Broken, Question
from owl2.eval.readers import Source
from owl2.eval.tasks import Task
from owl2.inference.engine import Engine

BROKEN_SHOWN = 20  # in results.json; all are in their file beside the answers
BLIND = "_blind"
SEED = 0  # torch's; decoding is greedy, so nothing is drawn


@dataclass(frozen=True)
class Ready:
    """A task whose data is there.

    Attributes:
        broken: what the reader could not make a question of.
    """

    task: Task
    source: Source
    questions: list[Question]
    broken: list[Broken]


def scores_of(metric: Metric, asked: Asked, blind: Asked | None) -> dict[str, Any]:
    """Metrics of all answers and of each kind, how many there are, and how long they took."""

    def of(kind: str | None) -> dict[str, float]:
        found: dict[str, float] = {}
        for ending, done in (("", asked), (BLIND, blind)):
            some = [a for a in done.answers if kind in (None, a.question.kind)] if done else []
            if some:
                values = metric.score(some).metrics
                found |= {f"{name}{ending}": float(value) for name, value in values.items()}
        return found

    kinds = [answer.question.kind for answer in asked.answers]
    scores: dict[str, Any] = {"metrics": of(None), "n": len(kinds)}
    if len(set(kinds)) > 1:
        scores["by_answer_kind"] = {k: {"n": kinds.count(k), **of(k)} for k in sorted(set(kinds))}
    scores["seconds"] = asked.seconds
    if blind is not None:
        scores["seconds_blind"] = blind.seconds
    scores["samples_per_second"] = len(kinds) / asked.seconds if asked.seconds else None
    return scores


def facts_of(ready: Ready, asked: Asked) -> dict[str, Any]:
    """The data, what is wrong with some of it, and what the paper reports."""
    recipe, metric = ready.task.recipe, ready.task.metric
    broken = [*ready.broken, *asked.broken]
    paper = {
        name: {"paper": figure, "scale": recipe.scale} for name, figure in recipe.paper.items()
    }
    return {
        "title": recipe.title,
        "suite": recipe.suite,
        "main": metric.main,
        "figures": paper,
        "scale": recipe.scale,
        "note": recipe.note,
        "prompt": ready.source.prompt,
        "shots": recipe.shots,
        "scorer": metric.to_dict(),
        "data": {
            "files": {path.name: file_fingerprint(path) for path in ready.source.read},
            "questions": questions_fingerprint(ready.questions),
            "pictures": pictures_fingerprint(asked.pictures),
        },
        "broken": {
            "n": len(broken),
            "first": [{"id": item.id, "reason": item.reason} for item in broken[:BROKEN_SHOWN]],
        },
    }


def settings_of(engine: Engine, task: Task) -> dict[str, Any]:
    """What the answers depend on, beside the questions, the weights and the machine."""
    processor, model = engine.processor, engine.model
    pictures = processor.image_processor
    return {
        "preprocessing": {
            "size": pictures.size,
            "policy": pictures.policy,
            "mean": list(pictures.image_mean),
            "std": list(pictures.image_std),
            "tokens_per_picture": processor.num_image_tokens,
        },
        "decoding": {
            **decoding_of(task),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "mam": bool(model.config.use_mam),
        },
        "seeds": {"torch": SEED},
        "versions": versions(),
    }


def machine_of(engine: Engine) -> dict[str, Any]:
    """Where it ran; answers do not depend on it but for rounding."""
    device = engine.model.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": str(device), "name": named, "threads": torch.get_num_threads()}


def answer_line(answer: Answer, score: Each) -> str:
    """A line of the file of answers, from which it can be scored and judged without the data."""
    question = answer.question
    row = {
        "id": question.id,
        "question": question.text,
        "kind": question.kind,
        "pictures": picture_names(question),
        "prompt": answer.prompt,
        "expected": list(question.expected),
        "facts": dict(question.facts),
        "answer": answer.text,
        "score": score,
    }
    return json.dumps(row, ensure_ascii=False, default=str)


def answer_lines(metric: Metric, answers: Sequence[Answer]) -> str:
    """The file of answers: a line each, in the order of the questions."""
    each = metric.score(answers).each if answers else []
    rows = zip(answers, each, strict=True)
    return "".join(f"{answer_line(answer, score)}\n" for answer, score in rows)


def broken_lines(broken: Sequence[Broken]) -> str:
    """The file of what could not be asked."""
    rows: list[Mapping[str, str]] = [{"id": item.id, "reason": item.reason} for item in broken]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
