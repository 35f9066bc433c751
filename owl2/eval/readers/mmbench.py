"""MMBench: one TSV with the images in it, in base64 (arXiv:2307.06281).

A question comes once for each of its options, which move on by one place each time; index, and so
id, of the later rounds is the first one's plus a multiple of 1,000,000. A file without such rounds
gets them here, as the metric needs them.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets.prompts import LETTERS
from owl2.errors import InputError
from owl2.eval.metrics.choices import listed
from owl2.eval.readers import Source
from owl2.eval.samples import Broken, Question

ROUND = 1_000_000
FILES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv")
COLUMNS = ("index", "question", "A", "B", "answer", "image")
LARGEST_FIELD = 2**30  # csv's own limit is less than an image
SHORTEST_IMAGE = 64  # characters of base64; less is the index of the row that has the image

Cells = dict[str, str]


def mmbench(source: Source) -> Iterator[Question | Broken]:
    """Ids are the indices; kinds are the categories.

    Raises:
        MissingData: no such file.
        InputError: a file without some of the columns, or without answers.
    """
    path = source.file(*FILES)
    # A question's rounds together, so that the first few questions are whole ones.
    rows, broken = [], []
    for number, row in enumerate(_rows(path), start=1):
        why = _wrong(row)
        if why is None:
            rows.append(row)
        else:
            broken.append(Broken(row["index"] or f"row {number}", f"{path}, row {number}: {why}"))
    if broken and not rows:
        raise InputError(f"{broken[0].reason}.")
    yield from broken
    rows.sort(key=lambda row: divmod(int(row["index"]), ROUND)[::-1])
    images = {row["index"]: row["image"] for row in rows if len(row["image"]) >= SHORTEST_IMAGE}
    has_rounds = any(int(row["index"]) >= ROUND for row in rows)
    for row in rows:
        index = int(row["index"])
        options = _options(row)
        place = LETTERS.index(_cell(row, "answer"))
        first = str(index % ROUND)
        image = images.get(row["index"]) or images.get(row["image"]) or images.get(first)
        for number in range(1 if has_rounds else len(options)):
            identity = str(index + number * ROUND)
            if image is None:
                yield Broken(identity, "there is no image in its row, nor in the first round's")
                continue
            turned = options[number:] + options[:number]
            words = "\n".join(filter(None, [_cell(row, "hint"), row["question"].strip()]))
            asked = source.ask(listed(words, turned))
            parts = [{"type": "image", "base64": image}, {"type": "text", "text": asked}]
            yield Question(
                identity,
                listed(words, turned),
                [{"role": "user", "content": parts}],
                (LETTERS[(place - number) % len(options)],),
                kind=_cell(row, "category"),
                facts={"options": turned, "question": first},
            )


def _rows(path: Path) -> Iterator[Cells]:
    csv.field_size_limit(LARGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}. The test split has no answers: "
                    "take the dev split."
                )
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a TSV: {error}") from error


def _cell(row: Cells, name: str) -> str:
    """What a cell holds; pandas writes "nan" for nothing."""
    value = row.get(name, "").strip()
    return "" if value == "nan" else value


def _options(row: Cells) -> list[str]:
    return [cell for letter in "ABCDEF" if (cell := _cell(row, letter))]


def _wrong(row: Cells) -> str | None:
    """What makes it impossible to ask or score a row."""
    if not row["index"].isdecimal():
        return f"the index {row['index']!r:.40} is no whole number"
    options, answer = _options(row), _cell(row, "answer")
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        return f"the answer {answer!r:.40} is none of the {len(options)} options' letters"
    return None
