"""Readers: published files of a benchmark → samples. One module per family of benchmarks.

A reader is a function of an `EvalData`. It yields an `EvalSample` for each row, and an
`InvalidEvalSample` for a row that the model cannot be asked. A missing file raises an `InputError`
with the code FILE_NOT_FOUND. Readers open no images.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.json_records import JsonRecord, as_record

# Errors of one row in a file of the right format.
ROW_ERRORS = (ErrorCode.INVALID_VALUE, ErrorCode.MISSING_IMAGE)
# Errors that all rows would have.
DATASET_ERRORS = (ErrorCode.FILE_NOT_FOUND, ErrorCode.MISSING_DEPENDENCY)
MAX_CSV_FIELD = 2**30  # characters; the default of csv is less than an image


@dataclass
class EvalData:
    """The files of a benchmark on this machine, and the prompt.

    Attributes:
        directories: Searched in this order: that of the benchmark, and the one that several
            benchmarks share (the images of COCO).
        prompt: Contains ``{question}``.
        options: The `dataset_kwargs` of the task.
        advice: Where to get the files, for error messages.
        files: Files that were read, for the fingerprint of the data.
    """

    directories: tuple[Path, ...]
    prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    advice: str = ""
    files: list[Path] = field(default_factory=list)

    def file(self, *names: str) -> Path:
        """The first of these relative names (``*`` allowed) that is a file.

        Raises:
            InputError: None exists (FILE_NOT_FOUND).
        """
        if not self.directories:
            raise InputError(
                f"{names[0]} is required: give its directory as --data. {self.advice}",
                ErrorCode.FILE_NOT_FOUND,
            )
        for directory in self.directories:
            for name in names:
                for path in sorted(directory.glob(name)):
                    if path.is_file():
                        if path not in self.files:
                            self.files.append(path)
                        return path
        alternatives = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
        raise InputError(
            f"{self.directories[0] / names[0]}{alternatives} does not exist. {self.advice}",
            ErrorCode.FILE_NOT_FOUND,
        )

    def siblings(self, *patterns: str) -> list[Path]:
        """All files of the first pattern that matches, in one directory, sorted by name."""
        first = self.file(*patterns)
        names = (Path(pattern).name for pattern in patterns)
        pattern = next(name for name in names if first in first.parent.glob(name))
        paths = sorted(first.parent.glob(pattern))
        self.files += [path for path in paths if path not in self.files]
        return paths

    def relative_name(self, path: Path) -> str:
        """The name of a file relative to the directory that contains it."""
        for directory in self.directories:
            if path.is_relative_to(directory):
                return path.relative_to(directory).as_posix()
        return path.name

    def find(self, *names: str) -> Path | None:
        """The first of these relative names that exists."""
        paths = (directory / name for directory in self.directories for name in names)
        return next((path for path in paths if path.exists()), None)

    def image(self, *names: str) -> Path:
        """The first of these relative names that exists.

        Raises:
            InputError: None exists (MISSING_IMAGE).
        """
        path = self.find(*names)
        if path is None:
            raise InputError(f"The image {names[0]} does not exist.", ErrorCode.MISSING_IMAGE)
        return path

    def ask(self, question: str) -> str:
        """The question in the prompt."""
        return self.prompt.replace("{question}", question)

    def sample(
        self,
        identifier: str,
        question: str,
        images: Iterable[Path],
        expected: Sequence[str],
        category: str = "",
        metadata: Mapping[str, Any] | None = None,
        text: str | None = None,
    ) -> EvalSample:
        """A sample with images before the text, without a separator (Specification §1.5).

        Args:
            text: Replaces `question` in the prompt.
        """
        messages = image_message(images, self.ask(question if text is None else text))
        expected = tuple(expected)
        return EvalSample(identifier, question, messages, expected, category, metadata or {})


Reader = Callable[[EvalData], Iterable[EvalSample | InvalidEvalSample]]


def find_reader(path: str) -> Reader:
    """The reader with a name of the form ``MODULE.FUNCTION`` in this package: "vqa.vqav2"."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


def image_message(images: Iterable[Any], text: str) -> list[dict[str, Any]]:
    """A user message with images (paths, or what `load_image` takes) before the text."""
    parts = [
        {"type": "image", "path": str(image)}
        if isinstance(image, Path)
        else {"type": "image", "image": image}
        for image in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def read_each(
    rows: Iterable[JsonRecord | InvalidEvalSample],
    identify: Callable[[int, JsonRecord], str],
    make: Callable[[str, JsonRecord], EvalSample],
) -> Iterator[EvalSample | InvalidEvalSample]:
    """One sample per row; a row with an error becomes an `InvalidEvalSample`.

    Args:
        identify: The id of a row, by its number (from 1) and the row.
        make: The sample, by its id and the row.

    Raises:
        InputError: One of `DATASET_ERRORS`; or no row has the published format, which means that
            this is another file.
    """
    first: InputError | None = None
    is_published_format = False
    for number, row in enumerate(rows, start=1):
        identifier = row.id if isinstance(row, InvalidEvalSample) else row.where.split(", ")[-1]
        try:
            if isinstance(row, InvalidEvalSample):
                raise InputError(row.reason, ErrorCode.INVALID_FORMAT)
            identifier = identify(number, row)
            sample = make(identifier, row)
        except InputError as error:
            if error.code in DATASET_ERRORS:
                raise
            is_published_format |= error.code in ROW_ERRORS
            first = first or error
            yield InvalidEvalSample(identifier, str(error))
        else:
            is_published_format = True
            yield sample
    if first is not None and not is_published_format:
        raise first


def numbered(prefix: str) -> Callable[[int, JsonRecord], str]:
    """Ids for `read_each` from the numbers of the rows: "prefix#1"."""
    return lambda number, _: f"{prefix}#{number}"


def invalid_value(reason: str) -> InputError:
    """The error for a value of one row that makes it unusable."""
    return InputError(reason, ErrorCode.INVALID_VALUE)


def read_jsonl(path: Path) -> Iterator[JsonRecord | InvalidEvalSample]:
    """The objects of a JSONL file; a line that is not an object is invalid.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, path, f"line {number}")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", ErrorCode.UNREADABLE_FILE
        ) from error


def _parse_line(line: bytes, path: Path, place: str) -> JsonRecord | InvalidEvalSample:
    where = f"{path}, {place}"
    try:
        return as_record(json.loads(line.decode("utf-8-sig")), where)
    except InputError as error:
        return InvalidEvalSample(place, str(error))
    except (ValueError, RecursionError) as error:
        return InvalidEvalSample(place, f"{where}: not JSON: {error}")


def read_text(path: Path) -> str:
    """The text of a file. Raises `InputError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.", ErrorCode.UNREADABLE_FILE) from error


def read_csv(
    path: Path, columns: Sequence[str], delimiter: str = ",", has_header: bool = True
) -> Iterator[dict[str, str]]:
    """The rows of a CSV or TSV file by column; a missing cell is "".

    Args:
        columns: Required columns of the header, or all columns of a file without a header.

    Raises:
        InputError: The file cannot be read, or a column is missing.
    """
    csv.field_size_limit(MAX_CSV_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = None if has_header else columns
            reader = csv.DictReader(file, header, delimiter=delimiter, restval="")
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}.", ErrorCode.INVALID_FORMAT
                )
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}", ErrorCode.UNREADABLE_FILE) from error


def split_invalid(
    items: Iterable[EvalSample | InvalidEvalSample],
) -> tuple[list[EvalSample], list[InvalidEvalSample]]:
    """Valid and invalid samples; a sample with the id of an earlier one is invalid."""
    samples: dict[str, EvalSample] = {}
    invalid: list[InvalidEvalSample] = []
    for item in items:
        if isinstance(item, InvalidEvalSample):
            invalid.append(item)
        elif item.id in samples:
            invalid.append(InvalidEvalSample(item.id, "An earlier sample has the same id."))
        else:
            samples[item.id] = item
    return list(samples.values()), invalid
