"""Rows of benchmarks whose files are not tables or lists: their own formats, and joined files."""

import ast
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from owl2.data.datasets import load_dataset
from owl2.data.datasets.prompts import LETTERS
from owl2.errors import ErrorCode, InputError, require_package
from owl2.eval.readers import EvalData
from owl2.eval.readers.rows import Row, read_jsonl, read_rows, read_table, read_text
from owl2.eval.samples import InvalidEvalSample
from owl2.json_records import JsonRecord, json_object, require_split
from owl2.processing.message_parts import IMAGE_TOKEN

# ------------------------------------------------------------------ VQAv2, OK-VQA

COCO_SPLIT = "val2014"


def vqa(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """The questions of VQAv2 or OK-VQA with the columns of their annotations.

    `question_types` are the names of those of OK-VQA. Use the annotations of its version 1.1: those
    of 1.0 contain stems ("poni tail").

    Raises:
        InputError: A file is missing, has another format, or the two are of different splits.
    """
    [questions], [annotations] = paths, data.paths(data.published.files[1])
    asked, annotated = json_object(questions), json_object(annotations)
    for file in (asked, annotated):
        require_split(file.value.get("data_subtype"), COCO_SPLIT, file.where)
    found = {str(row.value.get("question_id")): row.value for row in annotated.rows("annotations")}
    names = annotated.value.get("question_types") or {}
    for row in asked.rows("questions"):
        identifier = str(row.value.get("question_id"))
        if identifier in found:
            value = {"question_types": names, **row.value, **found[identifier]}
            yield JsonRecord(value, row.where)
        else:
            reason = f"{row.where}: {annotations.name} has no answer to question {identifier}."
            yield InvalidEvalSample(identifier, reason)


# ------------------------------------------------------------------ MME

MME_FOLDER = "questions_answers_YN"
MME_REQUEST = "Please answer yes or no."  # replaced by the prompt of the task


def mme(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """A category of MME (arXiv:2306.13394): a text file for each image.

    Text and image are in the same folder, or in ``questions_answers_YN/`` and ``images/``. The two
    lines of a text are a question and its answer, Yes or No, with a tab between them. Columns:
    `id` (such as "OCR/0001#1"), `question`, `answer`, `category`, `image_name`, `image`.
    """
    for path in paths:
        has_folders = path.parent.name == MME_FOLDER
        folder = path.parent.parent if has_folders else path.parent
        stem = f"{folder.name}/{'images/' if has_folders else ''}{path.stem}"
        images = [f"{stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
        image = next((name for name in images if data.find([name])), images[0])
        common = {"category": folder.name, "image_name": path.stem, "image": image}
        try:
            pairs = _mme_pairs(path)
        except InputError as error:  # one of many files, such as notes
            yield InvalidEvalSample(f"{folder.name}/{path.stem}", str(error))
            continue
        for number, (question, answer) in enumerate(pairs, start=1):
            row = {"id": f"{folder.name}/{path.stem}#{number}", "answer": answer, **common}
            text = question.replace(MME_REQUEST, "")  # a space remains at its end
            yield JsonRecord({**row, "question": text}, f"{path}, line {number}")


def _mme_pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        question, tab, answer = line.rpartition("\t")
        if tab and answer.strip().lower() in ("yes", "no"):
            pairs.append((question, answer.strip()))
        elif line.strip():
            raise InputError(
                f"{path}, line {number}: {line!r:.80} is not a question, a tab, and Yes or No.",
                ErrorCode.INVALID_FORMAT,
            )
    return pairs


# ------------------------------------------------------------------ MMBench

ROUND = 1_000_000
MIN_IMAGE_LENGTH = 64  # characters of base64; a shorter cell is the index of the row with the image


def mmbench(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """MMBench (arXiv:2307.06281): one TSV that contains the images in base64.

    A question has one round for each of its options, which are rotated by one position each time;
    the index of a later round is that of the first one plus a multiple of 1,000,000. A file without
    the later rounds gets them, as the metric needs them. Columns: `id` (the index), `question`,
    `hint`, `options`, `answer` (an index), `category`, `first` (the index of the first round),
    `image`.
    """
    rows = []
    for row in read_table(paths[0], "\t"):
        if isinstance(row, InvalidEvalSample):
            yield row
            continue
        # pandas writes "nan" for an empty cell
        cells = {k: "" if cell.strip() in ("", "nan") else cell for k, cell in row.value.items()}
        index, answer = cells.get("index", "").strip(), cells.get("answer", "").strip()
        options = [cells[letter] for letter in "ABCDEF" if cells.get(letter)]
        if index.isdecimal() and answer in [*LETTERS[: len(options)]]:
            rows.append((int(index), LETTERS.index(answer), options, cells, row.where))
        else:
            reason = f"the index {index!r:.40} or the answer {answer!r:.40} is invalid"
            identifier = index or row.where.split(", ")[-1]
            yield InvalidEvalSample(identifier, f"{row.where}: {reason}")
    # The rounds of a question follow each other, so that a limit does not cut most of them.
    rows.sort(key=lambda row: divmod(row[0], ROUND)[::-1])
    contents = {str(number): cells.get("image", "") for number, _, _, cells, _ in rows}
    images = {name: text for name, text in contents.items() if len(text) >= MIN_IMAGE_LENGTH}
    has_rounds = any(number >= ROUND for number, *_ in rows)
    for number, place, options, cells, where in rows:
        first = str(number % ROUND)
        names = (str(number), contents[str(number)], first)
        image = next((images[name] for name in names if name in images), None)
        for shift in range(1 if has_rounds else len(options)):
            value = {
                "id": number + shift * ROUND,
                "question": cells.get("question", ""),
                "hint": cells.get("hint"),
                "options": options[shift:] + options[:shift],
                "answer": (place - shift) % len(options),
                "category": cells.get("category", ""),
                "first": first,
                "image": {"base64": image} if image else "",
            }
            yield JsonRecord(value, where)


# ------------------------------------------------------------------ MMMU


def mmmu(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """MMMU (arXiv:2311.16502): Parquet files of the hub with the images.

    Columns: those of the file; `options` is a list or None for an open question, `answers` a list;
    ``<image 1>`` in question and options is replaced by ``<|image|>``; `image` are the images in
    the order of these places.

    Raises:
        InputError: pyarrow is missing; a file cannot be read.
    """
    require_package("pyarrow", "MMMU", "eval")
    from pyarrow import ArrowException, parquet

    for path in paths:
        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, ArrowException) as error:
            raise InputError(
                f"{path} cannot be read: {error}", ErrorCode.UNREADABLE_FILE
            ) from error
        for number, row in enumerate(rows, start=1):
            where = f"{path}, row {number}"
            try:
                yield JsonRecord(_mmmu_row(row), where)
            except (ValueError, SyntaxError, KeyError, TypeError) as error:
                yield InvalidEvalSample(str(row.get("id", number)), f"{where}: {error!r}")


def _mmmu_row(row: dict[str, Any]) -> dict[str, Any]:
    is_choice = row["question_type"] == "multiple-choice"
    texts = [row["question"], *(ast.literal_eval(row["options"]) if is_choice else [])]
    names = re.findall(r"<image (\d+)>", "\n".join(texts))
    images = [{"base64": b64encode(row[f"image_{name}"]["bytes"]).decode()} for name in names]
    question, *options = (re.sub(r"<image \d+>", IMAGE_TOKEN, text) for text in texts)
    # Several answers are a list as text: "['24/7', '3.429']".
    answer = str(row["answer"])
    answers = ast.literal_eval(answer) if re.fullmatch(r"\[.*\]", answer) else [answer]
    plain = {name: value for name, value in row.items() if not name.startswith("image_")}
    lists = {"options": options or None, "answers": [*map(str, answers)], "image": images}
    return {**plain, "question": question, **lists}


# ------------------------------------------------------------------ MSVD-QA, XSum, easy-VQA


def msvd_qa(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """The questions of MSVD-QA; `clip` is the file name in ``youtube_mapping.txt`` of the video."""
    path = data.paths(data.published.files[1])[0]
    clips = {}  # vid1 → -4wsuPCjDBc_5_15
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        cells = line.split()
        if len(cells) == 2:
            clips[cells[1]] = cells[0]
        elif cells:
            raise InputError(
                f"{path}, line {number}: {line!r:.80} is not a file name and an id.",
                ErrorCode.INVALID_FORMAT,
            )
    for row in read_rows(paths, data):
        if isinstance(row, JsonRecord):
            name = f"vid{row.value.get('video_id')}"
            row = JsonRecord({**row.value, "clip": clips.get(name, name)}, row.where)
        yield row


# Lines that the loader of the hub removes from the web pages.
XSUM_PAGE_LINES = {
    "Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp",
    "Linkedin", "LinkedIn", "Copy this link",
    "These are external links and will open in a new window",
}  # fmt: skip
XSUM_WORDS = 1000  # of an article; some articles are longer than any context


def xsum(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """Articles with one-sentence summaries: a JSONL file, or the list of splits of the authors.

    The files of the articles are in ``bbc-summary-data/``. Columns: `id`, `document` (truncated),
    `summary`.
    """
    if paths[0].suffix == ".jsonl":
        rows: Iterator[Row] = read_jsonl(paths[0])
    else:
        rows = (_xsum_article(name, data) for name in json_object(paths[0]).texts("test"))
    for number, row in enumerate(rows, start=1):
        if isinstance(row, JsonRecord) and isinstance(row.value.get("document"), str):
            start = re.match(rf"(?:\s*\S+){{0,{XSUM_WORDS}}}", row.value["document"])
            value = {"id": number, **row.value, "document": start and start[0]}
            row = JsonRecord(value, row.where)
        yield row


def _xsum_article(name: str, data: EvalData) -> Row:
    path = data.find([f"bbc-summary-data/{name}.summary"])
    try:
        *lines, rest = ("" if path is None else read_text(path)).split("\n")
    except InputError as error:
        return InvalidEvalSample(name, str(error))
    lines = [line for line in lines if line.strip() and line not in XSUM_PAGE_LINES]
    # "[SN]NAME[SN]" and the lines of that section
    sections = re.split(r"\[SN\]([A-Z-]+)\[SN\]", "\n".join([*lines, rest]))
    texts = [section.strip() for section in sections]
    found = dict(zip(texts[1::2], texts[2::2], strict=True))
    document, summary = found.get("RESTBODY", ""), found.get("FIRST-SENTENCE", "")
    return JsonRecord({"id": name, "document": document, "summary": summary}, name)


def easy_vqa(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """The test split of easy-VQA; never use it for training.

    Raises:
        InputError: The package easy-vqa is missing.
    """
    for sample in load_dataset("easy_vqa", "test", style="single", prompt="{question}"):
        user, answer = sample.messages
        image, text = user["content"]
        value = {"question": text["text"], "answer": answer["content"], "image": image["path"]}
        yield JsonRecord({"id": sample.source, **value}, sample.source)
