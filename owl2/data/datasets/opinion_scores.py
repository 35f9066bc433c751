"""Mean opinion scores of images: the rows that Q-Align and DeQA-Score are trained on.

::

    mos.csv                     a row per image: columns of the path, the score, its deviation
    mos.json (DeQA-Score)       {path: {"mos": 3.1, "std": 0.7}, ...}
    test_koniq.json (Q-Align)   [{"image": path, "gt_score": 3.1}, ...]

Each image becomes a question with a level word as its answer. The probabilities of the levels, the
score and its deviation are kept with it, for the losses of DeQA-Score (Model family §3).
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from owl2.data.row_parsers import image_reader, parse_row
from owl2.data.sample import Sample, SkippedRows
from owl2.data.soft_labels import Density, OpinionScore, training_rows
from owl2.errors import ErrorCode, InputError
from owl2.json_records import (
    JsonRecord,
    json_entries,
    json_object,
    json_rows,
    readable,
    starts_with_list,
)
from owl2.processing.video import VIDEO_SUFFIXES

# The last ones are values of `is_test` (LSVQ).
TRAIN_SPLITS = ("train", "training", "false", "0", "0.0")
TEST_SPLITS = ("test", "true", "1", "1.0")


def opinion_scores(
    file: Path,
    *,
    density: Density = "pdf",
    task: Literal["quality", "aesthetics"] = "quality",
    kind: Literal["image", "video"] = "image",
    split_file: str | None = None,
    split_column: str | None = None,
    image_column: str | None = None,
    mos_column: str | None = None,
    std_column: str | None = None,
    prefix: str | None = None,
    suffix: str | None = None,
) -> Iterator[Sample | SkippedRows]:
    """The training images of a file of scores.

    The levels divide the range of all scores in the file, those of test images included. Without
    deviations, an image has the probabilities of the two nearest levels.

    Args:
        density: How a normal distribution becomes probabilities of the levels: "pdf" (KonIQ, KADID)
            or "cdf" (SPAQ), see `soft_labels`.
        split_file: A JSON file ``{"train": [...], "test": [...]}`` of names, next to `file`.
            Images in neither list are skipped. Default: all images are for training.
        split_column: The column or key of the split instead: ``train`` or ``training``, or of a
            column ``is_test``, ``False``.
        image_column, mos_column, std_column: Columns or keys; default: ``image``, ``mos`` or
            ``gt_score``, ``std``.
        kind: "video": the files are videos, of which training uses one frame a second.
        prefix: Put before the paths, such as ``koniq/``.
        suffix: Put after the paths, such as ``.mp4``.

    Raises:
        InputError: The file or a value has another form, an image occurs twice, or all scores are
            equal.
    """
    scores: dict[str, OpinionScore] = {}
    own_split: dict[str, object] = {}
    for name, row in _records(file, image_column):
        if name in scores:
            raise InputError(f"{row.where}: {name} occurs twice", ErrorCode.CONFLICT)
        column = mos_column or next((key for key in ("mos", "gt_score") if key in row.value), "mos")
        std = std_column or ("std" if "std" in row.value else None)
        scores[name] = OpinionScore(_number(row, column), _number(row, std) if std else 0.0)
        own_split[name] = None if split_column is None else row.text(split_column).lower()
    if split_file is not None:
        lists = json_object(file.parent / split_file)
        split = {name: key for key in ("train", "test") for name in lists.texts(key)}
        own_split = {name: split.get(name, split.get(PurePosixPath(name).name)) for name in scores}
    is_split = split_file is not None or split_column is not None
    train = [name for name in scores if not is_split or own_split[name] in TRAIN_SPLITS]
    test = [name for name in scores if is_split and own_split[name] in TEST_SPLITS]
    for content in training_rows(scores, train, test, density, prefix or "", task, kind):
        content["image"] += suffix or ""
        if (Path(content["image"]).suffix.lower() in VIDEO_SUFFIXES) != (kind == "video"):
            raise InputError(
                f"{file}: {content['image']} is not the name of a file of kind {kind}; set `kind`, "
                f"or add the `suffix` of the videos ({', '.join(VIDEO_SUFFIXES)})",
                ErrorCode.INVALID_VALUE,
            )
        yield parse_row(content, f"{file}, {content['id']}", image_reader(Path("")))
    if len(train) < len(scores):
        yield SkippedRows("images of other splits", len(scores) - len(train))


def _records(file: Path, image_column: str | None) -> Iterator[tuple[str, JsonRecord]]:
    """(path of the image, its row)."""
    if file.suffix.lower() == ".csv":
        with readable(file), file.open(encoding="utf-8-sig", newline="") as lines:
            rows = [
                JsonRecord(row, f"{file}, line {number}")
                for number, row in enumerate(csv.DictReader(lines), start=2)
            ]
    else:
        with readable(file), file.open("rb") as content:
            is_list = starts_with_list(content)
        if not is_list:
            yield from json_entries(file)
            return
        rows = list(json_rows(file))
    for row in rows:
        yield row.text(image_column or "image"), row


def _number(row: JsonRecord, key: str) -> float:
    """A number; DeQA-Score's files and tables have strings."""
    value: Any = row.value.get(key)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        known = ", ".join(map(str, row.value))
        raise InputError(
            f"{row.where}: {key!r} is {value!r}, not a number; the columns are {known}",
            ErrorCode.MISSING_VALUE if value is None else ErrorCode.INVALID_TYPE,
        )
    return number
