"""A user's own questions: a JSONL file, a question a line.

::

    {"image": "a.jpg", "question": "What is it?", "answers": ["a dog", "dog"], "metric": "exact"}

- `image`: a path beside the file (or beside the data of ``--data``), a list of several, or none.
- `question`: may be missing for captions, which then are asked for in the paper's words.
- `answers` (or `answer`, a single one): all that are right; with options a letter or an option.
- `options`: two or more, of a multiple choice.
- `metric`: in the first line, for the whole file: `exact`, `vqa`, `cider` or `choice`. Without it,
  `choice` if the first line has options, else `exact`.
- `id`, `kind`: optional; ids are line numbers otherwise.

A line that cannot be asked (it is no JSON, it has another key, ...) is counted and named, and the
others go on; the first line that can be read counts as the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from owl2.data.datasets.prompts import CAPTION_PROMPT, CHOICE_REQUEST, LETTERS, VQA_PROMPT
from owl2.errors import InputError
from owl2.eval.metrics import find_metric
from owl2.eval.metrics.captions import check_installed
from owl2.eval.metrics.choices import listed
from owl2.eval.readers import Source, lines, with_images
from owl2.eval.samples import Broken, Question
from owl2.eval.task_config import Data, Recipe
from owl2.eval.tasks import Task
from owl2.json_records import JsonRecord
from owl2.registry import look_up

KEYS = dict.fromkeys(("image", "question", "answers", "answer", "options", "metric", "id", "kind"))
FEWEST_PEOPLE = 4  # of fewer, no answer can have a VQA accuracy of 1


@dataclass(frozen=True)
class _Way:
    """How questions of a metric are asked."""

    metric: str
    prompt: str
    max_new_tokens: int = 16
    scale: float = 100  # all but CIDEr are shares


WAYS = {
    "exact": _Way("exact.MATCH", VQA_PROMPT),
    "vqa": _Way("vqa.VQA", VQA_PROMPT),
    "choice": _Way("choices.LETTER", f"{{question}}\n{CHOICE_REQUEST}"),
    "cider": _Way("captions.CIDER", "{question}", max_new_tokens=64, scale=1),
}


def own_task(path: Path) -> Task:
    """The questions of a file as a task, which is called as the file is, without its ending.

    Raises:
        InputError: the file cannot be read, or no line of it; the metric is named wrongly.
    """
    name = _metric(path)
    way = WAYS[name]
    recipe = Recipe(
        title=path.name,
        suite=None,
        reader="own",
        metric=way.metric,
        prompt=way.prompt,
        max_new_tokens=way.max_new_tokens,
        shots=0,
        scale=way.scale,
        data=Data(files=[str(path)], origin=str(path), licence="the user's"),
    )
    return Task(path.stem, recipe, partial(_questions, path, name), find_metric(way.metric))


def _metric(path: Path) -> str:
    """The name of the file's metric, by its first line that can be read."""
    first: Broken | None = None
    for row in _rows(path):
        if isinstance(row, JsonRecord):
            name = row.value.get("metric", "choice" if "options" in row.value else "exact")
            look_up("metric for questions of one's own", name, WAYS)
            return str(name)
        first = first or row
    if first is None:
        raise InputError(f"{path} holds no questions.")
    raise InputError(f"{path} holds no line that can be read. The first: {first.reason}")


def _questions(path: Path, metric: str, source: Source) -> Iterator[Question | Broken]:
    if metric == "cider":
        check_installed()
    source.read.append(path)
    for row in _rows(path):
        if isinstance(row, Broken):
            yield row
            continue
        name = str(row.value.get("id", _number(row.where)))
        try:
            yield _question(path, metric, source, row, name)
        except InputError as error:
            yield Broken(name, str(error))


def _rows(path: Path) -> Iterator[JsonRecord | Broken]:
    """Its lines, with no other keys than ours; one that is none is no reason to stop.

    Raises:
        InputError: the file cannot be read; a key that seems to mean the metric, as without it all
            lines would be scored by another one.
    """
    for row in lines(path):
        if isinstance(row, Broken):
            yield Broken(_number(row.id), row.reason)
            continue
        try:
            # An image under another key would be a question asked blind.
            for key in row.value:
                look_up(f"key of a question ({row.where})", key, KEYS)
        except InputError as error:
            if get_close_matches(key, ["metric"]):
                raise
            yield Broken(str(row.value.get("id", _number(row.where))), str(error))
        else:
            yield row


def _number(where: str) -> str:
    return where.rpartition(" ")[2]


def _question(path: Path, metric: str, source: Source, row: JsonRecord, name: str) -> Question:
    """Raises `InputError`: whatever is wrong with the line."""
    if row.value.get("metric", metric) != metric:
        raise InputError(f"{row.where}: the metric of the file is {metric!r}, by its first line.")
    if "options" in row.value and metric != "choice":
        raise InputError(f"{row.where}: options are of a choice; the metric is {metric!r}.")
    blank = metric == "cider" and "question" not in row.value
    text = CAPTION_PROMPT if blank else row.text("question")
    if not text:
        raise InputError(f"{row.where}: the question is blank.")
    options = row.texts("options") if metric == "choice" else []
    expected = _expected(row, metric, options)
    images = [_image(path, source, row, name) for name in _names(row)]
    asked = listed(text, options) if options else text
    kind = row.text("kind") if "kind" in row.value else ""
    facts = {"options": options} if options else {}
    return Question(name, text, with_images(images, source.ask(asked)), expected, kind, facts)


def _names(row: JsonRecord) -> list[str]:
    """Of its images."""
    if isinstance(row.value.get("image"), list):
        return row.texts("image")
    return [row.text("image")] if "image" in row.value else []


def _image(path: Path, source: Source, row: JsonRecord, name: str) -> Path:
    beside = path.parent / name
    found = beside if name and beside.is_file() else source.image(name)
    if found is None or not name:
        raise InputError(f"{row.where}: the image {beside} is not there.")
    return found


def _expected(row: JsonRecord, metric: str, options: list[str]) -> tuple[str, ...]:
    given = row.texts("answers") if "answers" in row.value else [row.text("answer")]
    answers = [answer for answer in given if answer]
    if not answers:
        raise InputError(f"{row.where}: no answer is given.")
    if metric == "vqa" and len(answers) < FEWEST_PEOPLE:
        raise InputError(
            f"{row.where}: VQA accuracy compares with the answers of {FEWEST_PEOPLE} people at "
            f"least (ten, in VQA's own data), not {len(answers)}; for fewer take exact."
        )
    if metric == "cider" and not any(sign.isalnum() for answer in answers for sign in answer):
        raise InputError(f"{row.where}: no answer has words to compare a caption with.")
    return (_letter(row, answers, options),) if metric == "choice" else tuple(answers)


def _letter(row: JsonRecord, answers: list[str], options: list[str]) -> str:
    letters = LETTERS[: len(options)]
    if not 2 <= len(options) <= len(LETTERS) or len(answers) > 1:
        raise InputError(f"{row.where}: a multiple choice has 2 to 26 options and one answer.")
    if options.count(answers[0]) == 1:  # the option "B" before the letter B
        return letters[options.index(answers[0])]
    if len(answers[0]) == 1 and answers[0] in letters:
        return answers[0]
    raise InputError(f"{row.where}: the answer {answers[0]!r} is none of the options.")
