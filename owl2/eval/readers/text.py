"""The text benchmarks as published → questions whose facts are rows in the hub's columns.

lm-eval's tasks read those columns (`adapters.text_tasks`): a question's words here are the
bare ones, and lm-eval writes the prompt. XSum alone is asked like a question on an image.
"""

import csv
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from owl2.errors import InputError
from owl2.eval.readers import Source, each, lines
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_object

LETTERS = "ABCDEFG"


def _all(source: Source, *patterns: str) -> list[Path]:
    """Every file of the first pattern that has any; all of them in one folder, sorted by name."""
    first = source.file(*patterns)
    pattern = next(name for name in patterns if first in first.parent.glob(Path(name).name))
    paths = sorted(first.parent.glob(Path(pattern).name))
    source.read += [path for path in paths if path not in source.read]
    return paths


def _question(
    identity: str, text: str, expected: tuple[str, ...], facts: dict[str, object], kind: str = ""
) -> Question:
    return Question(identity, text, [{"role": "user", "content": text}], expected, kind, facts)


# ------------------------------------------------------------------ MMLU, BBH, AGIEval


def mmlu(source: Source) -> Iterator[Question | Broken]:
    """A CSV without a header a subject: question, four options, letter. Kinds are the subjects.

    The option `split` is "test", or "dev" for the five examples of each subject.

    """
    split = source.options.get("split", "test")
    name = f"*_{split}.csv"
    for path in _all(source, f"{split}/{name}", f"data/{split}/{name}", name):
        subject = path.name.removesuffix(f"_{split}.csv")
        for number, cells in enumerate(_csv(path), start=1):
            identity = f"{subject}#{number}"
            if len(cells) != 6:
                yield Broken(
                    identity,
                    f"{path}, row {number} has {len(cells)} columns, not a question, four options "
                    "and a letter",
                )
                continue
            question, *options, letter = cells
            letter = letter.strip()
            if letter not in tuple("ABCD"):
                yield Broken(identity, f"its answer is {letter!r}, none of A, B, C, D")
                continue
            facts: dict[str, object] = {
                "question": question,
                "subject": subject,
                "choices": options,
                "answer": LETTERS.index(letter),
            }
            yield _question(identity, question, (letter,), facts, subject)


def _csv(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.reader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def bbh(source: Source) -> Iterator[Question | Broken]:
    """A JSON a task, with `examples` of `input` and `target`. Kinds are the tasks."""
    for path in _all(source, "*.json", "bbh/*.json"):
        yield from each(json_object(path).rows("examples"), partial(_bbh, path.stem))


def _bbh(task: str, number: int, row: JsonRecord) -> Question:
    text, target = row.text("input"), row.text("target")
    facts: dict[str, object] = {"input": text, "target": target}
    return _question(f"{task}#{number}", text, (target,), facts, task)


# AGIEval's sets in Chinese, and those whose answer is written and not chosen.
CHINESE = (
    "logiqa-zh", "jec-qa-kd", "jec-qa-ca", "gaokao-chinese", "gaokao-geography", "gaokao-history",
    "gaokao-biology", "gaokao-chemistry", "gaokao-physics", "gaokao-mathqa", "gaokao-mathcloze",
)  # fmt: skip
WRITTEN = ("math", "gaokao-mathcloze")


def agieval(source: Source) -> Iterator[Question | Broken]:
    """Lines of JSON a set. Kinds are the sets; the prompts are the benchmark's own zero-shot ones.

    (AGIEval, arXiv:2304.06364; its ``src/dataset_loader.py``.)
    """
    for path in _all(source, "*.jsonl", "v1/*.jsonl", "data/v1/*.jsonl", "data/v1_1/*.jsonl"):
        yield from each(lines(path), partial(_agieval, path.stem))


def _agieval(name: str, number: int, row: JsonRecord) -> Question | Broken:
    identity = f"{name}#{number}"
    if name in WRITTEN:
        answer = row.text("answer")
        facts: dict[str, object] = {"query": _agieval_words(name, row), "answer": answer}
        return _question(identity, row.text("question"), (answer,), facts, name)
    options = row.texts("options")
    given = row.value.get("label")
    letters = list(given) if isinstance(given, (str, list)) else []  # "AB" or ["A", "B"]
    if not letters or any(letter not in tuple(LETTERS[: len(options)]) for letter in letters):
        return Broken(identity, f"its label is {given!r}, of {len(options)} options")
    gold = [LETTERS.index(letter) for letter in letters]
    facts = {"query": _agieval_words(name, row), "choices": options, "gold": gold}
    return _question(identity, row.text("question"), tuple(letters), facts, name)


def _agieval_words(name: str, row: JsonRecord) -> str:
    passage = row.text("passage") if row.value.get("passage") else ""
    question = row.text("question")
    if name in WRITTEN:
        chinese, english = f"问题：{question}\n答案：", f"Q: {question}\nA: The answer is"
        return passage + (chinese if name in CHINESE else english)
    options = row.texts("options")
    last, listed = LETTERS[len(options) - 1], " ".join(options)
    if name in CHINESE:
        return f"{passage}问题：{question} 选项：{listed}\n答案：从A到{last}, 我们应选择"
    return (
        f"{passage}Q: {question} Answer Choices: {listed}\nA: Among A through {last}, the answer is"
    )


# ------------------------------------------------------------------ ARC, HellaSwag, BoolQ, TriviaQA


def arc(source: Source) -> Iterator[Question | Broken]:
    """Lines of ``ARC-{set}-Test.jsonl``; the option `set` is "Challenge" or "Easy"."""
    name = f"ARC-{source.options['set']}"
    file = f"{name}-Test.jsonl"
    path = source.file(file, f"{name}/{file}", f"ARC-V1-Feb2018-2/{name}/{file}")
    return each(lines(path), _arc)


def _arc(_: int, row: JsonRecord) -> Question | Broken:
    asked = _inner(row, "question")
    options = asked.rows("choices")
    labels = [option.text("label") for option in options]
    identity, key = row.text("id"), row.text("answerKey")
    if key not in labels:
        return Broken(identity, f"its answerKey is {key!r}, none of {', '.join(labels)}")
    stem = asked.text("stem")
    choices = {"text": [option.text("text") for option in options], "label": labels}
    facts: dict[str, object] = {
        "id": identity, "question": stem, "choices": choices, "answerKey": key
    }  # fmt: skip
    return _question(identity, stem, (key,), facts)


def hellaswag(source: Source) -> Iterator[Question | Broken]:
    """Lines of ``hellaswag_val.jsonl``; kinds are "indomain" and "zeroshot"."""
    return each(lines(source.file("hellaswag_val.jsonl")), _hellaswag)


def _hellaswag(number: int, row: JsonRecord) -> Question | Broken:
    endings, label = row.texts("endings"), row.integer("label")
    if not 0 <= label < len(endings):
        return Broken(f"val#{number}", f"its label is {label}, of {len(endings)} endings")
    facts: dict[str, object] = {
        "ctx_a": row.text("ctx_a"),
        "ctx_b": row.text("ctx_b"),
        "activity_label": row.text("activity_label"),
        "endings": endings,
        "label": str(label),
    }
    kind = str(row.value.get("split_type", ""))
    return _question(f"val#{number}", row.text("ctx"), (endings[label],), facts, kind)


def boolq(source: Source) -> Iterator[Question | Broken]:
    """Lines of the authors' ``dev.jsonl`` (`answer`) or SuperGLUE's ``val.jsonl`` (`label`)."""
    return each(lines(source.file("dev.jsonl", "val.jsonl", "BoolQ/val.jsonl")), _boolq)


def _boolq(number: int, row: JsonRecord) -> Question | Broken:
    answer = row.value.get("answer", row.value.get("label"))
    if not isinstance(answer, bool):
        return Broken(f"val#{number}", f"its answer is {answer!r}, neither true nor false")
    question = row.text("question")
    facts: dict[str, object] = {
        "question": question, "passage": row.text("passage"), "label": int(answer)
    }  # fmt: skip
    return _question(f"val#{number}", question, ("yes" if answer else "no",), facts)


def triviaqa(source: Source) -> Iterator[Question | Broken]:
    """``qa/web-dev.json`` and ``qa/wikipedia-dev.json``, without their documents; the kinds."""
    for kind in ("web", "wikipedia"):
        path = source.file(f"qa/{kind}-dev.json", f"{kind}-dev.json")
        yield from each(json_object(path).rows("Data"), partial(_triviaqa, kind))


def _triviaqa(kind: str, _: int, row: JsonRecord) -> Question | Broken:
    question = row.text("Question")
    aliases = _inner(row, "Answer").texts("Aliases")
    identity = f"{kind}/{row.text('QuestionId')}"
    if not aliases:
        return Broken(identity, "it has no answer")
    facts: dict[str, object] = {"question": question, "answer": {"aliases": aliases}}
    return _question(identity, question, tuple(aliases), facts, kind)


def _inner(row: JsonRecord, key: str) -> JsonRecord:
    value = row.value.get(key)
    if not isinstance(value, dict):
        raise InputError(f"{row.where}: {key!r} is {value!r:.80}, not an object with keys.")
    return JsonRecord(value, f"{row.where}, {key}")


# ------------------------------------------------------------------ XSum


def xsum(source: Source) -> Iterator[Question | Broken]:
    """Articles and their one-sentence summaries, as lines of JSON or as the authors' files.

    The option `most_words` cuts articles after so many, as some are longer than any context.

    Raises:
        MissingData: neither ``test.jsonl`` nor the list of the split is there.
    """
    table = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
    path = source.file("test.jsonl", "xsum_test.jsonl", table)
    rows = lines(path) if path.suffix == ".jsonl" else _xsum_files(source, path)
    return each(rows, partial(_xsum, source))


def _xsum(source: Source, number: int, row: JsonRecord) -> Question | Broken:
    identity = str(row.value.get("id", number))
    article, summary = row.text("document"), row.text("summary")
    if not article or not summary:
        return Broken(identity, "its article or its summary is not there")
    words = re.findall(r"\S+\s*", article)
    text = "".join(words[: source.options["most_words"]]).strip()
    return Question(identity, text, [{"role": "user", "content": source.ask(text)}], (summary,))


def _xsum_files(source: Source, path: Path) -> Iterator[JsonRecord | Broken]:
    """As rows of the lines of JSON."""
    for identity in json_object(path).texts("test"):
        file = source.image(f"bbc-summary-data/{identity}.summary")
        try:
            parts = {} if file is None else _xsum_parts(_text(file))
        except InputError as error:
            yield Broken(identity, str(error))
            continue
        article, summary = parts.get("RESTBODY", ""), parts.get("FIRST-SENTENCE", "")
        yield JsonRecord({"id": identity, "document": article, "summary": summary}, identity)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _xsum_parts(text: str) -> dict[str, str]:
    """ "[SN]NAME[SN]" and lines after it → the lines by name, joined by spaces."""
    _, *pieces = re.split(r"\[SN\]([A-Z-]+)\[SN\]", text)
    return {
        name: " ".join(body.split()) for name, body in zip(pieces[::2], pieces[1::2], strict=True)
    }
