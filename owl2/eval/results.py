"""What ``results.json`` and the files of answers hold of a task (DESIGN 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from owl2.engine.engine import Engine
from owl2.eval.fingerprints import (
    file_fingerprint,
    images_fingerprint,
    questions_fingerprint,
    versions,
)
from owl2.eval.generate import Asked, decoding_of
from owl2.eval.metrics import Each, Metric, Scores
from owl2.eval.readers import Source
from owl2.eval.response_cache import json_text
from owl2.eval.samples import Answer, Broken, Question
from owl2.eval.tasks import Task

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


@dataclass(frozen=True)
class Scored:
    """A round's answers with their scores; `kinds`: the metrics of each kind of questions.

    Made once, as some metrics take a while.
    """

    asked: Asked
    scores: Scores
    kinds: dict[str, dict[str, float]]

    @classmethod
    def of(cls, metric: Metric, asked: Asked) -> "Scored":
        """Score answers: one at least."""
        by_kind: dict[str, list[Answer]] = {}
        for answer in asked.answers:
            by_kind.setdefault(answer.question.kind, []).append(answer)
        kinds = {}
        if len(by_kind) > 1:
            kinds = {kind: metric.score(by_kind[kind]).metrics for kind in sorted(by_kind)}
        return cls(asked, metric.score(asked.answers), kinds)

    @property
    def pairs(self) -> list[tuple[Answer, Each]]:
        """Each answer with its own score."""
        return list(zip(self.asked.answers, self.scores.each, strict=True))

    def lines(self, images: Sequence[Sequence[str]]) -> str:
        """The file of answers: a line each, in the order of the questions.

        Args:
            images: the names of each answer's.
        """
        rows = zip(self.pairs, images, strict=True)
        return "".join(f"{answer_line(*pair, names)}\n" for pair, names in rows)


def scores_of(scored: Scored, blind: Scored | None) -> dict[str, Any]:
    """Metrics of all answers and of each kind, how many there are, and how long they took."""

    def both(plain: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
        found = {name: float(value) for name, value in plain.items()}
        return found | {f"{name}{BLIND}": float(value) for name, value in other.items()}

    kinds = [answer.question.kind for answer in scored.asked.answers]
    seconds = scored.asked.seconds
    entry: dict[str, Any] = {
        "metrics": both(scored.scores.metrics, blind.scores.metrics if blind else {}),
        "n": len(kinds),
    }
    if scored.kinds:
        entry["by_answer_kind"] = {
            kind: {"n": kinds.count(kind), **both(own, blind.kinds.get(kind, {}) if blind else {})}
            for kind, own in scored.kinds.items()
        }
    entry["seconds"] = seconds
    if blind is not None:
        entry["seconds_blind"] = blind.asked.seconds
    entry["samples_per_second"] = len(kinds) / seconds if seconds else None
    return entry


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
            "files": {
                ready.source.name(path): file_fingerprint(path) for path in ready.source.read
            },
            "questions": questions_fingerprint(ready.questions),
            "images": images_fingerprint(asked.images),
        },
        "broken": {
            "n": len(broken),
            "first": [{"id": item.id, "reason": item.reason} for item in broken[:BROKEN_SHOWN]],
        },
    }


def settings_of(engine: Engine, task: Task) -> dict[str, Any]:
    """What the answers depend on, beside the questions, the weights and the machine."""
    processor, model = engine.processor, engine.model
    images = processor.image_processor
    return {
        "preprocessing": {
            "size": images.size,
            "policy": images.policy,
            "mean": list(images.image_mean),
            "std": list(images.image_std),
            "tokens_per_image": processor.num_image_tokens,
        },
        "decoding": {
            **({"by": "lm-eval"} if task.recipe.way == "lm-eval" else decoding_of(task)),
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


def answer_line(answer: Answer, score: Each, images: Sequence[str]) -> str:
    """A line of the file of answers, from which it can be scored and judged without the data."""
    question = answer.question
    row = {
        "id": question.id,
        "question": question.text,
        "kind": question.kind,
        "images": list(images),
        "prompt": answer.prompt,
        "expected": list(question.expected),
        "facts": dict(question.facts),
        "answer": answer.text,
        "score": score,
    }
    return json_text(row)


def broken_lines(broken: Sequence[Broken]) -> str:
    """The file of what could not be asked."""
    rows: list[Mapping[str, str]] = [{"id": item.id, "reason": item.reason} for item in broken]
    return "".join(json_text(row) + "\n" for row in rows)
