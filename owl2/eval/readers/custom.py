"""Custom questions: a JSONL file of the user with one question per line.

::

    {"image": "a.jpg", "question": "What is it?", "answers": ["a dog", "dog"], "metric": "exact"}

- `image`: a path relative to the file (or to ``--data``), a list of paths, or absent.
- `question`: may be absent for captions, which use the prompt of the paper.
- `answers` (or `answer` for a single one): all correct answers; with options a letter or an option.
- `options`: two or more options of a multiple choice.
- `mos`: an opinion score of the image, instead of question and answers, for scoring models.
- `metric`: of the first line, for all lines, one of `METRICS`. The default is `choice` if the first
  line has options, `quality` if it has an opinion score, and `exact` otherwise.
- `id`, `category`: optional. The default id is the number of the line.

The question is asked as it is written; with `choice`, the options and a request for a letter
follow.
The limit of new tokens is enough for the longest answer of the file (`EvalTask.max_new_tokens`).

An invalid line (not JSON, an unknown key, ...) is reported and skipped; the first line that can be
read counts as the first line.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from owl2.data.datasets.prompts import CAPTION_PROMPT, CHOICE_REQUEST, LETTERS
from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import EvalData
from owl2.eval.readers.rows import Row, read_jsonl
from owl2.eval.samples import InvalidEvalSample
from owl2.eval.task_config import DataFiles, SampleFields, TaskConfig
from owl2.json_records import JsonRecord
from owl2.registry import look_up

KEYS = dict.fromkeys(
    ("image", "question", "answers", "answer", "options", "mos", "metric", "id", "category")
)
MIN_VQA_ANSWERS = 4  # with fewer, no answer can have a VQA accuracy of 1
FIELDS: dict[str, Any] = {
    "expected": "answers",
    "image": "image | default(none)",
    "category": "category | default('')",
}
# The part of the configuration that depends on the metric.
METRICS: dict[str, dict[str, Any]] = {
    "exact": {"metric": "text.EXACT", "scale": 100},
    "vqa": {"metric": "vqa.VQA", "scale": 100},
    "choice": {
        "metric": "choices.LETTER",
        "prompt": f"{{question}}\n{CHOICE_REQUEST}",
        "scale": 100,
        "sample": SampleFields(**FIELDS, choices="options", show_choices=True),
    },
    "cider": {"metric": "captions.CIDER", "max_new_tokens": 64},
    "yes_no": {"metric": "yes_no.POPE", "scale": 100},
} | {
    name: {
        "metric": "choices.LIKELIHOOD",
        "scale": 100,
        "rank_options": rank_options,
        "sample": SampleFields(**FIELDS, choices="options", metadata={"options": "options"}),
    }
    for name, rank_options in (("likelihood", "sum"), ("likelihood_norm", "mean"))
}
METRICS |= {
    task: {
        "metric": "ratings.AGREEMENT",
        "rating": {"task": task},
        "digits": 4,
        "prompt": f"How would you rate the {task} of this image?",
        "sample": SampleFields(
            question=None,
            file="image",
            category=FIELDS["category"],
            metadata={"mos": "mos", "normal": "none"},
        ),
    }
    for task in ("quality", "aesthetics")
}
WITH_OPTIONS = ("choice", "likelihood", "likelihood_norm")


def custom_config(path: Path) -> TaskConfig:
    """The configuration for a file, with the metric of the first line that can be read.

    Raises:
        InputError: As `read_questions`; there is no valid line.
    """
    first = None
    for row in read_questions([path]):
        if isinstance(row, JsonRecord):
            config = {
                "title": path.name,
                "suite": None,
                "reader": "custom.read_questions",
                "sample": SampleFields(**FIELDS),
                "data": DataFiles(files=[path.name], origin=str(path), license="of the user"),
            }
            return TaskConfig.model_validate(config | METRICS[row.value["metric"]])
        first = first or row
    if first is None:
        raise InputError(f"{path} contains no questions.", ErrorCode.EMPTY_DATASET)
    raise InputError(
        f"{path} contains no valid line. The first error: {first.reason}", ErrorCode.INVALID_FORMAT
    )


def read_questions(paths: list[Path], data: EvalData | None = None) -> Iterator[Row]:
    """The lines of a file with `id`, `question`, `metric` and a list `answers`.

    Raises:
        InputError: The file cannot be read; the metric is unknown; a key is a misspelling of
            `metric`, without which all lines would be scored by another one.
    """
    metric = None
    for row in read_jsonl(paths[0]):
        if isinstance(row, InvalidEvalSample):
            yield row
            continue
        value = {"id": row.where.rpartition(" ")[2], "question": CAPTION_PROMPT, **row.value}
        try:
            # With an image under another key, the question would be asked without the image.
            for key in row.value:
                look_up(f"key of a question ({row.where})", key, KEYS)
        except InputError as error:
            if get_close_matches(key, ["metric"]):
                raise
            yield InvalidEvalSample(str(value["id"]), str(error))
            continue
        if metric is None:
            metric = _metric(row, "exact")
            look_up("metric for custom questions", metric, METRICS)
        try:
            value |= {"metric": metric, "answers": _answers(row, metric)}
        except InputError as error:
            yield InvalidEvalSample(str(value["id"]), str(error))
        else:
            yield JsonRecord(value, row.where)


def _metric(row: JsonRecord, default: str) -> Any:
    default = "choice" if "options" in row.value else default
    return row.value.get("metric", "quality" if "mos" in row.value else default)


def _answers(row: JsonRecord, metric: str) -> list[str] | list[int]:
    """The correct answers; with options the index of one."""
    if (own := _metric(row, metric)) != metric:
        raise _invalid(row, f"the metric is {own!r}, but {metric!r} in the first line of the file.")
    if "rating" in METRICS[metric]:
        row.numbers("mos")
        return []
    if "mos" in row.value:
        raise _invalid(row, f"the metric {metric!r} has no opinion score (mos).")
    if "options" in row.value and metric not in WITH_OPTIONS:
        raise _invalid(row, f"the metric {metric!r} has no options; {WITH_OPTIONS} have.")
    if "question" not in row.value and metric != "cider":
        raise _invalid(row, "'question' is missing.")
    answers = row.texts("answers") if "answers" in row.value else [row.text("answer")]
    answers = [answer for answer in answers if answer]
    if metric == "vqa" and len(answers) < MIN_VQA_ANSWERS:
        raise _invalid(
            row,
            f"VQA accuracy needs the answers of {MIN_VQA_ANSWERS} annotators or more (the dataset "
            f"VQA has ten), not {len(answers)}. Use the metric 'exact' for fewer.",
        )
    if metric == "cider" and not any(char.isalnum() for answer in answers for char in answer):
        raise _invalid(row, "no answer contains words to compare a caption with.")
    if metric == "yes_no" and answers not in (["yes"], ["no"]):
        raise _invalid(row, f"the answer is 'yes' or 'no', not {answers}.")
    if metric not in WITH_OPTIONS:
        return answers
    options = row.texts("options")
    if not 2 <= len(options) <= len(LETTERS) or len(answers) != 1:
        raise _invalid(row, "a multiple choice has 2 to 26 options and one answer.")
    [answer] = answers
    if options.count(answer) == 1:  # the option "B" precedes the letter B
        return [options.index(answer)]
    if answer in [*LETTERS[: len(options)]]:
        return [LETTERS.index(answer)]
    raise _invalid(row, f"the answer {answer!r} is not one of the options.")


def _invalid(row: JsonRecord, reason: str) -> InputError:
    return InputError(f"{row.where}: {reason}", ErrorCode.INVALID_VALUE)
