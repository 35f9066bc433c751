"""The configuration of each benchmark: the entries of ``task_configs/SUITE.yaml``.

An entry describes where the data of a benchmark is published, how its rows become samples, how they
are prompted and scored, and which result the paper reports. `tasks.py` makes a runnable task of it.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

# The files in ``task_configs/``, in the order of reports, and their titles there.
SUITES = {
    "captions": "Captions",
    "vqa": "Visual question answering",
    "mllm": "Multimodal benchmarks",
    "hallucination": "Hallucination",
    "text": "Text",
    "video": "Video",
    "document": "Documents",
    "scoring": "Scores",
}


class DataFiles(BaseModel):
    """The published files of a benchmark.

    Attributes:
        files: Patterns of the files that ``--data DIR/NAME`` must contain; " or " separates
            alternatives.
        names: Names of the files without suffix; others that match a pattern, such as those of
            another benchmark in the same directory, are not read. None: any name.
        num_row_files: The rows are in the files of the first patterns of `files`, as many as this.
        format: Of these files: a list of objects, an object of objects (`json_entries`), an object
            per line, or a table.
        field: The key of the rows in the object of a JSON file.
        columns: Of a table without a header.
        origin: Where to get the files.
        license: As the authors name it; "not stated" where they do not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[str]
    names: list[str] | None = None
    num_row_files: int = 1
    format: Literal["json", "json_entries", "jsonl", "csv", "tsv"] = "json"
    field: str | None = None
    columns: list[str] | None = None
    origin: str
    license: str


class SampleFields(BaseModel):
    """Jinja expressions of the columns of a row, for the attributes of an `EvalSample`.

    They may also use `number` (of the row in its file, from 1), `key` (of an entry), `file_name`
    (without suffix), `root` (the object that contains the rows) and the filter `letter_index`
    ("A" → 0).

    Attributes:
        filter: Rows for which it is false are not part of the benchmark.
        question: None if the prompt of the task is the question. ``<|image|>`` in it is the place
            of an image; otherwise images precede the text.
        hint: Text before the question: ``{hint}`` of the prompt ("N/A" without one), or else a
            line before the question.
        request: ``{request}`` of the prompt, if it depends on the row.
        choices: All possible answers.
        expected: The correct answer or a list of them, among `choices` if there are any; an integer
            is an index of `choices`. None where a judge decides.
        show_choices: The question contains the choices as lines "A. ...", and the expected answer
            is a letter.
        image: A file name, a list of them, or a mapping such as ``{'base64': ...}``.
        video: The name of a file, or of a folder with its frames and without suffix; or a list of
            alternatives.
        file: An image or a video that is rated, or a list of alternatives.
        segment: The start and the end of the relevant part of the video, in seconds.
        segment_fps: The number of frames per second, if the segment is in frames.
        frames: Number of frames, evenly spaced (not an expression).
        folders: Directories of the images or videos, in this order (not expressions).
        metadata: Other values that the metric needs; or the columns of the hub, for lm-eval.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: str = "true"
    id: str = "id"
    question: str | None = "question"
    hint: str = "none"
    request: str = "''"
    choices: str = "none"
    expected: str = "none"
    show_choices: bool = False
    category: str = "''"
    image: str = "none"
    video: str = "none"
    file: str = "none"
    segment: str = "none"
    segment_fps: str = "none"
    frames: int = 8
    folders: list[str] = ["."]
    metadata: str | dict[str, str] = "{}"


class Rating(BaseModel):
    """What a scoring model rates: see `ImageScorer.score_iter`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["quality", "aesthetics"] = "quality"
    kind: Literal["image", "video"] = "image"


class TaskConfig(BaseModel):
    """How a benchmark is read, prompted and scored.

    Attributes:
        title: For reports.
        suite: One of `SUITES`, by default that of the file; None for none of them.
        in_paper: Whether the paper has the benchmark; ``--suite paper`` excludes others.
        reader: MODULE.FUNCTION in `owl2.eval.readers`, for rows that are not as `data` describes.
        sample: How a row becomes a sample.
        metric: MODULE.NAME in `owl2.eval.metrics`.
        prompt: Text in which ``{question}``, ``{hint}`` and ``{request}`` are replaced.
        plain_prompt: The prompt with ``--prompts plain``; None for the same.
        assistant_space: Whether a space follows ``ASSISTANT:``, which is one more id. The
            conversation then has no system text, and no line break after the image. None: the chat
            format of the checkpoint.
        max_new_tokens, min_new_tokens: Maximum and minimum number of generated tokens.
        sources: The origin of `prompt`, which includes the numbers of tokens, and of `scoring`: a
            script of the authors (Specification §1.5), the benchmark, or "our choice".
        image_policy: How an image becomes a square; None for the checkpoint's.
        rank_options: The response is the option with the highest log-probability, instead of
            generated text: `sum` over the tokens of an option with its end token, or their `mean`.
            The options are `options` of the metadata.
        num_fewshot: Number of examples before the question, from the second pattern of the files.
        judge: Whether a language model scores the responses.
        paper: The results of the paper (Specification §3) by metric, as the paper prints them.
        published: The results of several models by hub id and metric, instead of `paper`.
        paper_with_limit: Whether the metrics of some samples can be compared with `paper`.
        scale: Factor from the values of the metrics to those of the paper, such as 100 for percent.
        digits: Decimals of the metrics in reports.
        note: Differences to the protocol of the paper.
        rating: A scoring model rates each image or video, and no text is generated. The prompt is
            that of the model. None: the responses are texts.
        lm_eval: The YAML file of the task below ``tasks/`` of lm-eval, which generates and scores
            the responses, for text only; a group has one for each ``{category}``. None: the engine
            of owl2 generates the responses, and `metric` scores them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    suite: str | None
    in_paper: bool = True
    reader: str = "rows.read_rows"
    sample: SampleFields = SampleFields()
    metric: str
    prompt: str = "{question}"
    plain_prompt: str | None = None
    assistant_space: bool | None = None
    max_new_tokens: int = Field(16, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    sources: dict[Literal["prompt", "scoring"], str] = Field(default_factory=dict)
    image_policy: Literal["resize", "pad", "crop"] | None = None
    rank_options: Literal["sum", "mean"] | None = None
    num_fewshot: int = Field(0, ge=0)
    judge: bool = False
    paper: dict[str, float] = Field(default_factory=dict)
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    paper_with_limit: bool = True
    scale: float = Field(1, gt=0)
    digits: int = 2
    note: str = ""
    rating: Rating | None = None
    lm_eval: str | None = None
    data: DataFiles


@cache
def task_configs() -> Mapping[str, TaskConfig]:
    """All entries by name, in the order of the suites."""
    found: dict[str, TaskConfig] = {}
    folder = files("owl2.eval").joinpath("task_configs")
    for suite in SUITES:
        entries = yaml.safe_load(folder.joinpath(f"{suite}.yaml").read_text(encoding="utf-8"))
        shared: dict[str, Any] = {"suite": suite, **entries.pop("_shared")}
        found |= {name: TaskConfig(**{**shared, **entry}) for name, entry in entries.items()}
    return found
