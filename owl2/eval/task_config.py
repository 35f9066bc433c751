"""The configuration of each benchmark: the entries of ``task_configs/SUITE.yaml``.

An entry says how a benchmark is prompted and scored, which result the paper reports, and where its
data is published. `tasks.py` makes a runnable task of it.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

SUITES = ("captions", "vqa", "mllm", "hallucination", "text", "video")  # `paper`: all of them


class DataFiles(BaseModel):
    """The published files of a benchmark.

    Attributes:
        files: Patterns of the files that ``--data DIR/NAME`` must contain; " or " separates
            alternatives.
        origin: Where to get them.
        license: As the authors name it; "not stated" where they do not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[str]
    origin: str
    license: str


class TaskConfig(BaseModel):
    """How a benchmark is prompted and scored.

    Attributes:
        title: For reports.
        suite: The table of the paper; None for benchmarks that the paper does not have.
        engine: `owl2` generates the responses and `metric` scores them; `lm-eval` does both, for
            text only.
        reader: MODULE.FUNCTION in `owl2.eval.readers`.
        metric: MODULE.NAME in `owl2.eval.metrics`.
        dataset_kwargs: Options of the reader, such as a split.
        prompt: Text in which ``{question}`` is replaced by the question.
        max_new_tokens: Maximum number of generated tokens.
        image_policy: How an image becomes a square; None for the checkpoint's.
        num_fewshot: Number of examples before the question.
        judge: Whether a language model scores the responses.
        paper: The results of the paper (Specification §3) by metric, as the paper prints them.
        scale: Factor from the values of the metrics to those of the paper, such as 100 for percent.
        note: Differences to the protocol of the paper.
        lmms_eval, lm_eval: The name of the task there, if it exists.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    suite: Literal["captions", "vqa", "mllm", "hallucination", "text", "video"] | None
    engine: Literal["owl2", "lm-eval"] = "owl2"
    reader: str
    metric: str
    dataset_kwargs: dict[str, Any] = Field(default_factory=dict)
    prompt: str = "{question}"
    max_new_tokens: int = Field(16, ge=1)
    image_policy: Literal["resize", "pad"] | None = None
    num_fewshot: int = Field(0, ge=0)
    judge: bool = False
    paper: dict[str, float] = Field(default_factory=dict)
    scale: float = Field(1, gt=0)
    note: str = ""
    lmms_eval: str | None = None
    lm_eval: str | None = None
    data: DataFiles


@cache
def task_configs() -> Mapping[str, TaskConfig]:
    """All entries by name, in the order of the suites."""
    found: dict[str, TaskConfig] = {}
    folder = files("owl2.eval").joinpath("task_configs")
    for file in (*SUITES, "others"):
        entries = yaml.safe_load(folder.joinpath(f"{file}.yaml").read_text(encoding="utf-8"))
        shared = entries.pop("_shared", {})
        found |= {name: TaskConfig(**{**shared, **entry}) for name, entry in entries.items()}
    return found
