"""Files of rows, of any size, as a sequence of Samples.

::

    .json    one list: [row, row, ...], as LLaVA's files
    .jsonl   a row a line

    file ──one pass──► where each row lies (24 bytes a row) ──[i]──► read, parse, check ──► Sample

What a row may be: see `readers`. Only the index stays in memory, so that a file need not fit, and
workers need not each have a copy.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from array import array
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from owl2.data.row_parsers import ImagePathResolver, image_root, parse_row
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError

_PIECE = 1 << 22  # bytes read at a time
_PATIENCE = 2.0  # seconds without a bar
_SPACE = re.compile(r"[ \t\n\r]*")  # what is white space to JSON


# Where a row lies: its first byte, how many bytes, and its number in the file, from 1.
Place = tuple[int, int, int]


def is_json_file(name: str | Path) -> bool:
    """Whether `JsonDataset` knows the ending of this name."""
    return Path(name).suffix.lower() in (".json", ".jsonl")


class JsonDataset(Sequence[Sample]):
    """The Samples of a `.json` or `.jsonl` file, by the rule of its ending.

    `images`: the directory that image paths in the file start from; default: the file's own.

    Making it reads the file once, with a bar on stderr if that takes long. Of a `.json` all JSON is
    parsed then, of a `.jsonl` only the ends of lines are found. What a row says is looked at when
    it is taken: a bad one raises `InputError` with the file and the row or line. The file must not
    change meanwhile.

    Raises:
        InputError: no such file, another ending, no row in it, or in a `.json`: not JSON, no list.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self.path = Path(path)
        if not is_json_file(path):
            raise InputError(
                f"{path}: the ending must be .json (a list of rows, as LLaVA's files) or .jsonl (a "
                "row in each line)."
            )
        self._is_list = self.path.suffix.lower() == ".json"
        self._image = ImagePathResolver(image_root(self.path, images))
        self._file: BinaryIO | None = None
        places = array("q")
        with _reported(self.path), self.path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if not self._is_list and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                raise InputError(f"{self.path} is a list of rows, not a row a line: name it .json.")
            file.seek(0)
            find = _rows_of_list if self._is_list else _rows_of_lines
            for place in _watched(find(file, self.path), f"Reading {self.path}", self._size):
                places.extend(place)
        if not places:
            what = "must hold a list of rows, with one at least" if self._is_list else "has no row"
            raise InputError(f"{path} {what}.")
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start, length, number = (int(value) for value in self._places[index])
        source = f"{self.path}, {'row' if self._is_list else 'line'} {number}"
        return parse_row(self._parsed(start, length, source), source, self._image)

    def _parsed(self, start: int, length: int, source: str) -> Any:
        with _reported(self.path):
            # The file's position is shared with forked workers, so it is not used.
            data = os.pread(self._descriptor(), length, start)
        try:
            return json.loads(data.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{source}: not text in UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON: {error}") from error

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = self.path.open("rb")
            if os.fstat(self._file.fileno()).st_size != self._size:
                raise InputError(
                    f"{self.path} has changed since it was opened: start again.",
                    ErrorCode.FILE_CHANGED,
                )
        return self._file.fileno()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens its own


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", ErrorCode.FILE_CHANGED
        ) from error


# ------------------------------------------------------------------ lines


def _rows_of_lines(file: BinaryIO, _: Path) -> Iterator[Place]:
    start = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    file.seek(start)
    # Not splitlines: it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield start, len(line), number
        start += len(line)


# ------------------------------------------------------------------ a list


def _rows_of_list(file: BinaryIO, path: Path) -> Iterator[Place]:
    text = _Text(file, path)
    if text.peek() != "[":
        hint = " One row a line belongs in a .jsonl file." if text.peek() == "{" else ""
        raise InputError(f"{path} must hold a list of rows.{hint}")
    text.skip(1)
    for number in count(1) if text.peek() != "]" else ():
        text.peek()
        start = text.byte
        text.skip_value(number)
        yield start, text.byte - start, number
        mark = text.peek()
        if mark == "]":
            break
        if mark != ",":
            raise InputError(f"{path} is not JSON: after row {number} there is no ',' and no ']'.")
        text.skip(1)
    text.skip(1)
    if text.peek():
        raise InputError(f"{path} is not JSON: there is more after the list (byte {text.byte}).")


class _Text:
    """Walks through JSON, of which it holds a piece. `byte`: where in the file it stands."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decode = getincrementaldecoder("utf-8")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._is_all = False
        self.byte = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(self.byte)

    def peek(self) -> str:
        """The next character that is no white space, or nothing at the end; goes there."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None  # the pattern also matches nothing
            self.skip(found.end() - self._at)
            if self._at < len(self._text) or self._is_all:
                return self._text[self._at : self._at + 1]
            self._grow()

    def skip(self, characters: int) -> None:
        """Go on by so many characters of those that are held."""
        end = self._at + characters
        self.byte += self._bytes(end)
        self._at = end

    def skip_value(self, row: int) -> None:
        """Go behind the value that starts here. Raises `InputError` if there is none."""
        while True:
            try:
                _, end = self._parse(self._text, self._at)
                if end < len(self._text) or self._is_all:
                    return self.skip(end - self._at)
            except json.JSONDecodeError as error:
                if self._is_all or not self._is_cut(error):
                    place = f"row {row}, byte {self.byte + self._bytes(error.pos)}"
                    raise InputError(f"{self._path} is not JSON: {place}: {error.msg}.") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self._path} is not JSON: row {row}: {error}") from error
            self._grow()

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the piece's end may be what is wrong. What is wrong far from it, more text does
        not heal, and a broken file need not be held whole to say so."""
        return error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated string")

    def _grow(self) -> None:
        # As much again as there is: a row of many pieces is not parsed once for each of them.
        data = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._is_all = not data
        try:
            more = self._decode(data, final=self._is_all)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path} is not a text file in UTF-8: {error}") from error
        self._text = self._text[self._at :] + more
        self._at = 0

    def _bytes(self, end: int) -> int:
        """How many bytes in the file it is from here to the character `end`."""
        if self._text.isascii():
            return end - self._at
        return len(self._text[self._at : end].encode())


# ------------------------------------------------------------------ waiting


def _watched(places: Iterator[Place], title: str, size: int) -> Iterator[Place]:
    """The same places; with a bar on the terminal, of `size` bytes, once that takes long."""
    began = time.monotonic()
    bar: Progress | None = None
    try:
        for number, place in enumerate(places):
            yield place
            if number % 1024 == 0 and time.monotonic() - began > _PATIENCE and _has_watcher():
                if bar is None:
                    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
                    bar = Progress(*columns, console=Console(stderr=True), transient=True)
                    bar.add_task(title, total=size)
                    bar.start()
                bar.update(bar.task_ids[0], completed=place[0])
    finally:
        if bar is not None:
            bar.stop()


def _has_watcher() -> bool:
    # Of several training processes that share a terminal, the first draws.
    is_first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
    return is_first and sys.stderr.isatty()
