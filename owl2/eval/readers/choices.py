"""Multiple-choice questions about images: MMBench, SEED-Bench, Q-Bench and ScienceQA."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from owl2.data.datasets.prompts import LETTERS
from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics.choices import with_options
from owl2.eval.readers import EvalData, image_message, invalid_value, numbered, read_csv, read_each
from owl2.eval.readers.video import video_images
from owl2.eval.readers.vqa import text_or_empty
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.json_records import JsonRecord, json_entries, json_object, json_rows

Cells = dict[str, str]

# ------------------------------------------------------------------ MMBench

ROUND = 1_000_000
MMBENCH_FILES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv")
MMBENCH_COLUMNS = ("index", "question", "A", "B", "answer", "image")
MIN_IMAGE_LENGTH = 64  # characters of base64; a shorter cell is the index of the row with the image


def mmbench(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """MMBench (arXiv:2307.06281): one TSV that contains the images in base64.

    A question has one round for each of its options, which are rotated by one position each time;
    the index of a later round, which is the id, is that of the first one plus a multiple of
    1,000,000. The reader adds the rounds to a file without them, as the metric needs them.
    Categories are the published ones.

    Raises:
        InputError: The file is missing, or has no answers or another format.
    """
    path = data.file(*MMBENCH_FILES)
    rows, first = [], None
    for number, row in enumerate(read_csv(path, MMBENCH_COLUMNS, delimiter="\t"), start=1):
        reason = _mmbench_error(row)
        if reason is None:
            rows.append(row)
            continue
        invalid = InvalidEvalSample(
            row["index"] or f"row {number}", f"{path}, row {number}: {reason}"
        )
        first = first or invalid
        yield invalid
    if first is not None and not rows:
        raise InputError(first.reason, ErrorCode.INVALID_FORMAT)
    # The rounds of a question follow each other, so that a limit does not cut most of them.
    rows.sort(key=lambda row: divmod(int(row["index"]), ROUND)[::-1])
    images = {row["index"]: row["image"] for row in rows if len(row["image"]) >= MIN_IMAGE_LENGTH}
    has_rounds = any(int(row["index"]) >= ROUND for row in rows)
    for row in rows:
        index, options = int(row["index"]), _mmbench_options(row)
        answer, first_index = LETTERS.index(_cell(row, "answer")), str(index % ROUND)
        image = images.get(row["index"]) or images.get(row["image"]) or images.get(first_index)
        question = "\n".join(filter(None, [_cell(row, "hint"), row["question"].strip()]))
        for shift in range(1 if has_rounds else len(options)):
            identifier = str(index + shift * ROUND)
            if image is None:
                yield InvalidEvalSample(identifier, "Neither this row nor round 1 has an image.")
                continue
            rotated = options[shift:] + options[:shift]
            text = with_options(question, rotated)
            content = [{"type": "image", "base64": image}, {"type": "text", "text": data.ask(text)}]
            yield EvalSample(
                identifier,
                text,
                [{"role": "user", "content": content}],
                (LETTERS[(answer - shift) % len(options)],),
                category=_cell(row, "category"),
                metadata={"options": rotated, "question": first_index},
            )


def _cell(row: Cells, name: str) -> str:
    """The content of a cell; pandas writes "nan" for an empty one."""
    value = row.get(name, "").strip()
    return "" if value == "nan" else value


def _mmbench_options(row: Cells) -> list[str]:
    return [cell for letter in "ABCDEF" if (cell := _cell(row, letter))]


def _mmbench_error(row: Cells) -> str | None:
    if not row["index"].isdecimal():
        return f"the index {row['index']!r:.40} is not an integer"
    options, answer = _mmbench_options(row), _cell(row, "answer")
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        return f"the answer {answer!r:.40} is not the letter of one of the {len(options)} options"
    return None


# ------------------------------------------------------------------ SEED-Bench

SEED_BENCH_OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


def seed_bench(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """14,233 questions about images and 3,757 about videos, four options (arXiv:2307.16125).

    Ids are the published ones; categories are the twelve types of questions. Images are in
    ``SEED-Bench-image/``; videos, or folders with their frames, in ``SEED-Bench-video/``. Option
    `frames`: the number of frames, from the segment that the question is about.

    Raises:
        InputError: `SEED-Bench.json` is missing or has another format.
    """
    published = json_object(data.file("SEED-Bench.json"))
    types = published.value.get("question_type")
    if not isinstance(types, dict):
        raise InputError(
            f"{published.where}: 'question_type' must be an object.", ErrorCode.INVALID_FORMAT
        )
    categories = {str(number): name for name, number in types.items()}

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        options = [str(row.value.get(key, "")).strip() for key in SEED_BENCH_OPTIONS]
        answer, media = row.text("answer"), row.text("data_type")
        if answer not in ("A", "B", "C", "D") or not all(options):
            raise invalid_value("There are no four options with an answer among them.")
        question = with_options(row.text("question"), options)
        images = _seed_bench_images(data, row, media)
        category = categories.get(str(row.value.get("question_type_id")), "")
        metadata = {"options": options, "media": media}
        messages = image_message(images, data.ask(question))
        return EvalSample(identifier, question, messages, (answer,), category, metadata)

    rows = published.rows("questions")
    return read_each(rows, lambda _, row: str(row.value.get("question_id")), make)


def _seed_bench_images(data: EvalData, row: JsonRecord, media: str) -> list[Any]:
    name = row.text("data_id")
    if media == "image":
        return [data.image(f"SEED-Bench-image/{name}")]
    segment = row.value.get("segment") or None  # seconds; only some videos have one
    if segment is not None and not _is_pair(segment):
        raise invalid_value(f"The segment {segment!r:.60} is not a pair of numbers.")
    names = (f"SEED-Bench-video/{name}", f"SEED-Bench-video/{Path(name).stem}")
    seconds = None if segment is None else (float(segment[0]), float(segment[1]))
    return video_images(data, names, seconds)


def _is_pair(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 2
    return is_list and all(isinstance(second, (int, float)) for second in value)


# ------------------------------------------------------------------ Q-Bench

Q_BENCH_TYPES = ("yes or no", "what", "how")


def q_bench(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """LLVisionQA, the first task of Q-Bench: the quality of an image (arXiv:2309.14181).

    Ids are the numbers of the rows; categories are the three types of questions.

    Raises:
        InputError: `llvisionqa_dev.json` is missing or has another format.
    """

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        options, answer = row.texts("candidates"), row.text("correct_ans")
        image = data.image(f"images/{row.text('img_path')}")
        if answer not in options:
            raise invalid_value(f"The answer {answer!r:.60} is not one of the options.")
        kind = row.integer("type")
        category = Q_BENCH_TYPES[kind] if kind in range(len(Q_BENCH_TYPES)) else str(kind)
        question, letter = (
            with_options(row.text("question"), options),
            LETTERS[options.index(answer)],
        )
        return data.sample(identifier, question, [image], [letter], category, {"options": options})

    rows = json_rows(data.file("llvisionqa_dev.json"))
    return read_each(rows, numbered("q_bench"), make)


# ------------------------------------------------------------------ ScienceQA


def science_qa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """ScienceQA-IMG: 2,017 questions with an image; categories are the subjects.

    Option `split` of `pid_splits.json`: "test" by default. The hint precedes the question as
    "Context: ...", as in the evaluation of LLaVA.

    Raises:
        InputError: `problems.json` or `pid_splits.json` is missing or has another format.
    """
    problems = dict(json_entries(data.file("problems.json", "data/scienceqa/problems.json")))
    splits = json_object(data.file("pid_splits.json", "data/scienceqa/pid_splits.json"))
    split = str(data.options.get("split", "test"))
    identifiers = [
        identifier
        for identifier in splits.texts(split)
        if identifier in problems and problems[identifier].value.get("image")
    ]

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        question, options = row.text("question"), row.texts("choices")
        index = row.integer("answer")
        if not 0 <= index < len(options):
            raise invalid_value(f"The answer {index} is not one of the {len(options)} choices.")
        name = f"{identifier}/{row.text('image')}"
        folders = (f"{split}/", f"images/{split}/", "images/", "")
        image = data.image(*(f"{folder}{name}" for folder in folders))
        hint = text_or_empty(row.value, "hint").strip()
        text = with_options(f"Context: {hint}\n{question}" if hint else question, options)
        category, metadata = text_or_empty(row.value, "subject"), {"options": options}
        expected = [LETTERS[index]]
        return data.sample(identifier, question, [image], expected, category, metadata, text)

    rows = [problems[identifier] for identifier in identifiers]
    yield from read_each(rows, lambda number, _: identifiers[number - 1], make)
    for identifier in splits.texts(split):
        if identifier not in problems:
            yield InvalidEvalSample(identifier, f"{splits.where} has it, problems.json does not.")
