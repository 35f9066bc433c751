"""JSON files of published datasets: incremental parsing, typed access to records, file lookup.

`scan_json` parses a list or an object element by element, so a file need not fit into memory.
"""

import csv
import json
import re
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from owl2.errors import ErrorCode, InputError, shorten

CHUNK_BYTES = 1 << 22
_SPACE = re.compile(r"[ \t\n\r]*")  # the white space of JSON; `\s` matches more


@dataclass(frozen=True)
class JsonRecord:
    """An object of a JSON file and its position `where`, with typed access to its values.

    Raises:
        InputError: From all methods, if the key is missing or the value has another type.
    """

    value: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """The string under `key`, stripped."""
        return str(self._get(key, "a string", (str,))).strip()

    def integer(self, key: str) -> int:
        """The integer under `key`."""
        return int(self._get(key, "an integer", (int,)))

    def numbers(self, *keys: str) -> tuple[float, ...]:
        """The numbers under `keys`."""
        return tuple(self._get(key, "a number", (int, float)) for key in keys)

    def texts(self, key: str) -> list[str]:
        """The list of strings under `key`, each stripped."""
        values = self._get(key, "a list of strings", (list,))
        if not all(isinstance(value, str) for value in values):
            raise self._type_error(key, "a list of strings")
        return [value.strip() for value in values]

    def rows(self, key: str) -> "list[JsonRecord]":
        """The list of objects under `key`."""
        values = self._get(key, "a list of objects", (list,))
        return [as_record(value, f"{self.where}, {key} {n}") for n, value in enumerate(values, 1)]

    def _get(self, key: str, kind: str, types: tuple[type, ...]) -> Any:
        if key not in self.value:
            raise InputError(f"{self.where}: {key!r} ({kind}) is missing", ErrorCode.MISSING_VALUE)
        if not isinstance(self.value[key], types) or isinstance(self.value[key], bool):
            raise self._type_error(key, kind)
        return self.value[key]

    def _type_error(self, key: str, kind: str) -> InputError:
        message = f"{self.where}: {key!r} is {shorten(self.value[key])}, not {kind}"
        return InputError(message, ErrorCode.INVALID_TYPE)


def as_record(value: Any, where: str) -> JsonRecord:
    """Raises `InputError` unless `value` is an object."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {shorten(value)}, not an object", ErrorCode.INVALID_TYPE)
    return JsonRecord(value, where)


def refuse_test(split: object, where: str) -> None:
    """Raises `InputError` if the name of a split is that of a test split."""
    if isinstance(split, str) and "test" in split.lower():
        raise InputError(
            f"{where}: {split!r} is a test split, which is reserved for evaluation",
            ErrorCode.INVALID_VALUE,
        )


def require_split(actual: object, wanted: str, where: str) -> None:
    """Raises `InputError` if a file or row names a split that is not `wanted`, or a test split."""
    refuse_test(actual, where)
    if actual not in (None, wanted):
        raise InputError(
            f"{where} belongs to the split {shorten(actual)}, not to {wanted!r}",
            ErrorCode.INVALID_VALUE,
        )


# ------------------------------------------------------------------ files


def json_object(path: Path) -> JsonRecord:
    """The object in a file. Raises `InputError` if the file is unreadable or has another form."""
    with readable(path):
        return as_record(parse_json(path.read_bytes(), str(path)), str(path))


def json_rows(path: Path) -> Iterator[JsonRecord]:
    """The objects of a file with a list, one by one. Raises `InputError` as `json_object`."""
    with readable(path), path.open("rb") as file:
        for number, element in enumerate(scan_json(file, path, "["), start=1):
            yield as_record(element.value, f"{path}, row {number}")


def json_entries(path: Path) -> Iterator[tuple[str, JsonRecord]]:
    """(key, object) of a file with an object of objects. Raises `InputError` as `json_object`."""
    with readable(path), path.open("rb") as file:
        for element in scan_json(file, path, "{"):
            yield element.key, as_record(element.value, f"{path}, {element.key!r}")


def json_lines(path: Path) -> Iterator[JsonRecord]:
    """The objects of a file with one per line. Raises `InputError` as `json_object`."""
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield as_record(parse_json(line, where), where)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Converts an error of reading `path`, or of decoding its text, to an `InputError`."""
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        missing = isinstance(error, FileNotFoundError)
        code = ErrorCode.FILE_NOT_FOUND if missing else ErrorCode.UNREADABLE_FILE
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason}", code) from error


def parse_json(data: bytes, where: str) -> Any:
    """A JSON text in UTF-8. Raises `InputError` that starts with `where`."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}", ErrorCode.INVALID_FORMAT) from error


def starts_with_list(file: BinaryIO) -> bool:
    """Whether the first character of a file, after white space, is "["."""
    return file.read(64).lstrip(BOM_UTF8 + b" \t\r\n")[:1] == b"["


class JsonElement(NamedTuple):
    """An element of a list, or an entry of an object: `length` bytes of the file from `start`."""

    key: str
    value: Any
    start: int
    length: int


def scan_json(file: BinaryIO, path: Path, opening: Literal["[", "{"]) -> Iterator[JsonElement]:
    """The elements of the list "[" or the object "{" in a file, without loading all of it.

    Raises:
        InputError: The file contains something else, or is not valid JSON in UTF-8. The message
            names the row and the byte.
    """
    cursor = _JsonCursor(file, path)
    kind, closing = ("list", "]") if opening == "[" else ("object", "}")
    if cursor.peek() != opening:
        hint = " A file with a row per line needs the suffix .jsonl." if kind == "list" else ""
        raise InputError(f"{path} must contain a JSON {kind}.{hint}", ErrorCode.INVALID_FORMAT)
    row = 0
    while row == 0 or cursor.peek() == ",":
        cursor.skip_character()
        if row == 0 and cursor.peek() == closing:
            raise InputError(f"{path} contains an empty {kind}", ErrorCode.EMPTY_DATASET)
        row += 1
        key = ""
        if opening == "{":
            key = cursor.value(row)
            if not isinstance(key, str) or cursor.peek() != ":":
                raise cursor.error(f"row {row}: expected a key and a ':'")
            cursor.skip_character()
        cursor.peek()
        start = cursor.byte
        yield JsonElement(key, cursor.value(row), start, cursor.byte - start)
    if cursor.peek() != closing:
        raise cursor.error(f"expected ',' or '{closing}' after row {row}")
    cursor.skip_character()
    if cursor.peek():
        raise cursor.error("unexpected content after the end")


class _JsonCursor:
    """A position, `byte`, in a JSON file. One chunk of the file is in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.byte = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(self.byte)
        self._file, self._path = file, path
        self._decode = getincrementaldecoder("utf-8")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._position, self._at_end = "", 0, False

    def error(self, reason: str) -> InputError:
        message = f"{self._path}, byte {self.byte}: not valid JSON: {reason}"
        return InputError(message, ErrorCode.INVALID_FORMAT)

    def peek(self) -> str:
        """Skips white space, and returns the next character, or "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._position)
            self.advance(space.end() if space else self._position)
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._read_chunk()

    def advance(self, position: int) -> None:
        """Moves to a position in the current chunk."""
        skipped = self._text[self._position : position]
        self.byte += len(skipped) if skipped.isascii() else len(skipped.encode())
        self._position = position

    def skip_character(self) -> None:
        """Moves behind an ASCII character that `peek` returned."""
        self.byte += 1
        self._position += 1

    def value(self, row: int) -> Any:
        """Parses the value after white space, and advances behind it."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._position)
                if end < len(self._text) or self._at_end:
                    self.advance(end)
                    return value
            except json.JSONDecodeError as error:
                # An error near the end of the chunk, or in an open string, may disappear with more
                # text. For others a broken file is not read to its end.
                near_end = error.pos > len(self._text) - 16
                if self._at_end or not (near_end or error.msg.startswith("Unterminated string")):
                    self.advance(error.pos)
                    raise self.error(f"row {row}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise self.error(f"row {row}: {error}") from error
            self._read_chunk()

    def _read_chunk(self) -> None:
        # The remaining text doubles, so a row of many chunks is not parsed once per chunk.
        data = self._file.read(max(CHUNK_BYTES, len(self._text) - self._position))
        self._at_end = not data
        try:
            more = self._decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error}") from error
        self._text, self._position = self._text[self._position :] + more, 0
