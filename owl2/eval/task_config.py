"""The paper's benchmarks as data: an entry each in ``paper/SUITE.yaml``.

An entry says how a benchmark is asked and scored, what the paper reports, and where its data is;
`tasks.py` makes something of it that runs.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

SUITES = ("captions", "vqa", "mllm", "hallucination", "text", "video")  # `paper`: all of them


class Data(BaseModel):
    """Where a benchmark's data is.

    Attributes:
        files: what has to be in ``--data DIR/NAME``, as published; for people and for `--list`.
        origin: where to get it.
        licence: of the data, as its authors name it; "not stated" where they do not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[str]
    origin: str
    licence: str


class Recipe(BaseModel):
    """How a benchmark is asked and scored.

    Attributes:
        title: for people.
        suite: of the paper's tables; None: in none of them.
        way: `generate`: the model answers and `metric` scores; `lm-eval`: the suite of that name
            does both, over the text alone.
        reader, metric: see `owl2.eval.readers` and `owl2.eval.metrics`.
        prompt: with ``{question}`` in it, or whole.
        image_policy: how an image becomes a square; None: as the checkpoint says.
        shots: examples before the question.
        judge: whether a judging model decides.
        paper: the paper's figures (SPEC 3), by the metric's name, as the paper prints them.
        scale: what a metric's value is times, to be told as the paper tells it: 100 for shares.
        note: what makes the two hard to compare, if anything does.
        lmms, lm: the task's name in lmms-eval or lm-eval, if it has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    suite: Literal["captions", "vqa", "mllm", "hallucination", "text", "video"] | None
    way: Literal["generate", "lm-eval"] = "generate"
    reader: str
    metric: str
    options: dict[str, Any] = Field(default_factory=dict)
    prompt: str = "{question}"
    max_new_tokens: int = Field(16, ge=1)
    image_policy: Literal["resize", "pad"] | None = None
    shots: int = Field(0, ge=0)
    judge: bool = False
    paper: dict[str, float] = Field(default_factory=dict)
    scale: float = Field(1, gt=0)
    note: str = ""
    lmms: str | None = None
    lm: str | None = None
    data: Data


@cache
def recipes() -> Mapping[str, Recipe]:
    """All entries by name, suite by suite."""
    found: dict[str, Recipe] = {}
    for file in (*SUITES, "others"):
        text = (
            files("owl2.eval").joinpath("task_configs", f"{file}.yaml").read_text(encoding="utf-8")
        )
        found |= {name: Recipe(**entry) for name, entry in (yaml.safe_load(text) or {}).items()}
    return found
