"""JSON and JSONL files of any size as a dataset with random access.

::

    .json     one list, [row, row, ...], as in LLaVA's files
    .jsonl    a row per line

    file ──one pass──► position of each row (24 bytes per row) ──[i]──► parse, validate ──► Sample

`row_parsers` describes the rows. Only the positions stay in memory, so a file may be larger than
the memory, and workers share them.
"""

import multiprocessing
import os
import sys
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console

from owl2.data.row_parsers import image_reader, image_root, parse_row
from owl2.data.sample import RowDataset, Sample
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.json_records import parse_json, readable, scan_json, starts_with_list
from owl2.progress import ProgressReporter

PROGRESS_DELAY = 2.0  # seconds before a progress bar appears


def is_json_file(name: str | Path) -> bool:
    """Whether the suffix is one that `JsonDataset` reads."""
    return Path(name).suffix.lower() in (".json", ".jsonl")


class JsonDataset(RowDataset):
    """The samples of a `.json` or `.jsonl` file.

    The constructor reads the file once, with a progress bar if that takes long. It parses a
    `.json` file completely; in a `.jsonl` file it only finds the ends of the lines. Rows are
    parsed and validated when they are accessed. The file must not change in the meantime.

    Args:
        images: Root directory of the image paths in the file; default: the directory of the file.

    Raises:
        InputError: The file is missing, has another suffix or no row, or a `.json` file is not
            valid JSON or not a list. When a row is accessed: the row is not valid, or the file has
            changed.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self.path = expand_user(path)
        if not is_json_file(path):
            raise InputError(
                f"{path}: the suffix must be .json (a list of rows) or .jsonl (a row per line)",
                ErrorCode.INVALID_FORMAT,
            )
        self._is_list = self.path.suffix.lower() == ".json"
        self._file: BinaryIO | None = None
        positions = array("q")
        with readable(self.path), self.path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            self._image = image_reader(image_root(self.path.parent, images))
            if not self._is_list and starts_with_list(file):
                raise InputError(
                    f"{path} is a list of rows, not a row per line: it needs the suffix .json",
                    ErrorCode.INVALID_FORMAT,
                )
            file.seek(0)
            rows = (
                ((e.start, e.length, i) for i, e in enumerate(scan_json(file, self.path, "["), 1))
                if self._is_list
                else _line_positions(file)
            )
            with _progress(self.path, self._size) as progress:
                for start, length, number in rows:
                    positions.extend((start, length, number))
                    if number % 1024 == 0:
                        progress.advance(start - progress.completed)
        if not positions:
            raise InputError(f"{path} has no rows", ErrorCode.EMPTY_DATASET)
        self._positions = np.frombuffer(positions, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._positions)

    def source(self, index: int) -> str:
        return f"{self.path}, {'row' if self._is_list else 'line'} {self._positions[index, 2]}"

    def read(self, index: int) -> Sample:
        """The sample at `index`."""
        start, length, _ = self._positions[index].tolist()
        try:
            if self._file is None:
                self._file = self.path.open("rb")
                if os.fstat(self._file.fileno()).st_size != self._size:
                    raise InputError(
                        f"{self.path}: the file has changed since it was opened",
                        ErrorCode.FILE_CHANGED,
                    )
            # Forked workers share the position of the file, so it is not used.
            data = os.pread(self._file.fileno(), length, start)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read: {error.strerror}", ErrorCode.FILE_CHANGED
            ) from error
        source = self.source(index)
        return parse_row(parse_json(data, source), source, self._image)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens the file itself


def _line_positions(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """(first byte, bytes, line number from 1) of each line that is not blank."""
    start = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    file.seek(start)
    # Not str.splitlines, which also splits at characters that JSON allows in a string.
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield start, len(line), number
        start += len(line)


def _progress(path: Path, size: int) -> ProgressReporter:
    # Of several training processes on one terminal, only the first shows a bar.
    is_first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=not (is_first and sys.stderr.isatty()))
    return ProgressReporter(
        console, f"Reading {path}", size, unit="bytes", transient=True, delay=PROGRESS_DELAY
    )
