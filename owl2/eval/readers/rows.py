"""Rows of JSON, JSONL, CSV and TSV files."""

import csv
from collections.abc import Iterator
from pathlib import Path

from owl2.errors import InputError
from owl2.eval.readers import EvalData
from owl2.eval.samples import InvalidEvalSample
from owl2.eval.task_config import DataFiles
from owl2.json_records import (
    JsonRecord,
    as_record,
    json_entries,
    json_object,
    json_rows,
    parse_json,
    readable,
)

MAX_CSV_FIELD = 2**30  # characters; the default of csv is less than an image

Row = JsonRecord | InvalidEvalSample


def read_rows(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """The rows of files in the format that `data.published` describes.

    `file_name`, `number`, `key` and `root` are additional columns, see `SampleFields`. A line that
    is not an object, and a row of a table with additional cells, is invalid.

    Raises:
        InputError: A file cannot be read or has another format.
    """
    for path in paths:
        for number, row in enumerate(_parse(path, data.published), start=1):
            if isinstance(row, JsonRecord):
                value = {"file_name": path.stem, "number": number, **row.value}
                row = JsonRecord(value, row.where)
            yield row


def _parse(path: Path, published: DataFiles) -> Iterator[Row]:
    if published.format == "jsonl":
        return read_jsonl(path)
    if published.format in ("csv", "tsv"):
        return read_table(path, "," if published.format == "csv" else "\t", published.columns)
    if published.format == "json_entries":
        entries = json_entries(path)
        return (JsonRecord({"key": key, **row.value}, row.where) for key, row in entries)
    if published.field is None:
        return json_rows(path)
    root = json_object(path)
    rows = root.rows(published.field)
    return (JsonRecord({"root": root.value, **row.value}, row.where) for row in rows)


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file; a line that is not an object is invalid.

    Raises:
        InputError: The file cannot be read.
    """
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield as_record(parse_json(line, where), where)
            except InputError as error:
                yield InvalidEvalSample(f"line {number}", str(error))


def read_table(path: Path, delimiter: str, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a CSV or TSV file by column; a missing cell is "".

    Args:
        columns: Of a file without a header.

    Raises:
        InputError: The file cannot be read.
    """
    csv.field_size_limit(MAX_CSV_FIELD)
    with readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, columns, delimiter=delimiter, restval="")
        for number, cells in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if None in cells:  # the key of additional cells
                yield InvalidEvalSample(f"row {number}", f"{where}: it has too many cells.")
            else:
                yield JsonRecord(cells, where)


def read_text(path: Path) -> str:
    """The text of a file. Raises `InputError` if it cannot be read."""
    with readable(path):
        return path.read_text(encoding="utf-8-sig")
