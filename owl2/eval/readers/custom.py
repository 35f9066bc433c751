"""Custom questions: a JSONL file of the user with one question per line.

::

    {"image": "a.jpg", "question": "What is it?", "answers": ["a dog", "dog"], "metric": "exact"}

- `image`: a path relative to the file (or to ``--data``), a list of paths, or absent.
- `question`: may be absent for captions, which use the prompt of the paper.
- `answers` (or `answer` for a single one): all correct answers; with options a letter or an option.
- `options`: two or more options of a multiple choice.
- `metric`: of the first line, for all lines: `exact`, `vqa`, `cider` or `choice`. The default is
  `choice` if the first line has options, and `exact` otherwise.
- `id`, `category`: optional. The default id is the number of the line.

An invalid line (not JSON, an unknown key, ...) is reported and skipped; the first line that can be
read counts as the first line.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from owl2.data.datasets.prompts import CAPTION_PROMPT, CHOICE_REQUEST, LETTERS, VQA_PROMPT
from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics.captions import require_pycocoevalcap
from owl2.eval.metrics.choices import with_options
from owl2.eval.readers import EvalData, Reader, read_jsonl
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.eval.task_config import DataFiles, TaskConfig
from owl2.json_records import JsonRecord
from owl2.registry import look_up

KEYS = dict.fromkeys(
    ("image", "question", "answers", "answer", "options", "metric", "id", "category")
)
MIN_VQA_ANSWERS = 4  # with fewer, no answer can have a VQA accuracy of 1
# The part of the configuration that depends on the metric.
METRICS = {
    "exact": {"metric": "exact.MATCH", "prompt": VQA_PROMPT, "scale": 100},
    "vqa": {"metric": "vqa.VQA", "prompt": VQA_PROMPT, "scale": 100},
    "choice": {
        "metric": "choices.LETTER",
        "prompt": f"{{question}}\n{CHOICE_REQUEST}",
        "scale": 100,
    },
    "cider": {"metric": "captions.CIDER", "prompt": "{question}", "max_new_tokens": 64},
}


def custom_config(path: Path) -> tuple[TaskConfig, Reader]:
    """The configuration and the reader for a file.

    Raises:
        InputError: The file or all of its lines cannot be read; the metric is unknown.
    """
    metric = _metric(path)
    config = TaskConfig.model_validate(
        {
            "title": path.name,
            "suite": None,
            "reader": "custom",
            "data": DataFiles(files=[str(path)], origin=str(path), license="of the user"),
            **METRICS[metric],
        }
    )

    def reader(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
        if metric == "cider":
            require_pycocoevalcap()
        data.files.append(path)
        for row in _rows(path):
            if isinstance(row, InvalidEvalSample):
                yield row
                continue
            identifier = str(row.value.get("id", _line_number(row.where)))
            try:
                yield _sample(path, metric, data, row, identifier)
            except InputError as error:
                yield InvalidEvalSample(identifier, str(error))

    return config, reader


def _metric(path: Path) -> str:
    """The metric of the first line that can be read."""
    first: InvalidEvalSample | None = None
    for row in _rows(path):
        if isinstance(row, JsonRecord):
            name = row.value.get("metric", "choice" if "options" in row.value else "exact")
            look_up("metric for custom questions", name, METRICS)
            return str(name)
        first = first or row
    if first is None:
        raise InputError(f"{path} contains no questions.", ErrorCode.EMPTY_DATASET)
    raise InputError(
        f"{path} contains no valid line. The first error: {first.reason}", ErrorCode.INVALID_FORMAT
    )


def _rows(path: Path) -> Iterator[JsonRecord | InvalidEvalSample]:
    """The lines with known keys; others are invalid.

    Raises:
        InputError: The file cannot be read; a key is a misspelling of `metric`, without which all
            lines would be scored by another one.
    """
    for row in read_jsonl(path):
        if isinstance(row, InvalidEvalSample):
            yield InvalidEvalSample(_line_number(row.id), row.reason)
            continue
        try:
            # With an image under another key, the question would be asked without the image.
            for key in row.value:
                look_up(f"key of a question ({row.where})", key, KEYS)
        except InputError as error:
            if get_close_matches(key, ["metric"]):
                raise
            yield InvalidEvalSample(str(row.value.get("id", _line_number(row.where))), str(error))
        else:
            yield row


def _line_number(where: str) -> str:
    return where.rpartition(" ")[2]


def _sample(
    path: Path, metric: str, data: EvalData, row: JsonRecord, identifier: str
) -> EvalSample:
    if row.value.get("metric", metric) != metric:
        raise _invalid(row, f"the metric of the file is {metric!r}, as in its first line.")
    if "options" in row.value and metric != "choice":
        raise _invalid(row, f"only the metric 'choice' has options, not {metric!r}.")
    is_caption = metric == "cider" and "question" not in row.value
    question = CAPTION_PROMPT if is_caption else row.text("question")
    if not question:
        raise _invalid(row, "the question is empty.")
    options = row.texts("options") if metric == "choice" else []
    expected = _expected(row, metric, options)
    given = row.value.get("image")
    names = row.texts("image") if isinstance(given, list) else []
    if "image" in row.value and not isinstance(given, list):
        names = [row.text("image")]
    images = []
    for name in names:
        sibling = path.parent / name
        image = sibling if name and sibling.is_file() else data.find(name)
        if image is None or not name:
            raise InputError(
                f"{row.where}: the image {sibling} does not exist.", ErrorCode.MISSING_IMAGE
            )
        images.append(image)
    category = row.text("category") if "category" in row.value else ""
    metadata = {"options": options} if options else {}
    text = with_options(question, options) if options else question
    return data.sample(identifier, question, images, expected, category, metadata, text)


def _expected(row: JsonRecord, metric: str, options: list[str]) -> list[str]:
    given = row.texts("answers") if "answers" in row.value else [row.text("answer")]
    answers = [answer for answer in given if answer]
    if not answers:
        raise _invalid(row, "there is no answer.")
    if metric == "vqa" and len(answers) < MIN_VQA_ANSWERS:
        raise _invalid(
            row,
            f"VQA accuracy needs the answers of {MIN_VQA_ANSWERS} annotators or more (the dataset "
            f"VQA has ten), not {len(answers)}. Use the metric 'exact' for fewer.",
        )
    if metric == "cider" and not any(char.isalnum() for answer in answers for char in answer):
        raise _invalid(row, "no answer contains words to compare a caption with.")
    return [_letter(row, answers, options)] if metric == "choice" else answers


def _letter(row: JsonRecord, answers: list[str], options: list[str]) -> str:
    letters = LETTERS[: len(options)]
    if not 2 <= len(options) <= len(LETTERS) or len(answers) > 1:
        raise _invalid(row, "a multiple choice has 2 to 26 options and one answer.")
    [answer] = answers
    if options.count(answer) == 1:  # the option "B" precedes the letter B
        return letters[options.index(answer)]
    if len(answer) == 1 and answer in letters:
        return answer
    raise _invalid(row, f"the answer {answer!r} is not one of the options.")


def _invalid(row: JsonRecord, reason: str) -> InputError:
    return InputError(f"{row.where}: {reason}", ErrorCode.INVALID_VALUE)
