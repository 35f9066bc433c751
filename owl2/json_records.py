"""What the converters of public data sets share: reading published files, and leaving things out.

A converter is a function of the folder with the published files, and of keyword options that have
defaults. It yields Samples whose image paths are relative, as the authors' archives have them,
and a `SkippedRows` for what is known to be in the files and cannot be learned from. Whatever else is
not as published raises `InputError` with the file and the row.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.registry import look_up

_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's; `\s` is more
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class SkippedRows:
    """So many things were left out; `reason` names them in the plural: "questions without ..."."""

    reason: str
    count: int = 1


@dataclass(frozen=True)
class JsonRecord:
    """An object of a published file, and where it stands there. Its getters raise `InputError`."""

    value: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """The string under `key`, without space around it."""
        value = self._get(key, "a text")
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value.strip()

    def integer(self, key: str) -> int:
        """The whole number under `key`."""
        value = self._get(key, "a whole number")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "a whole number")
        return value

    def numbers(self, *keys: str) -> tuple[float, ...]:
        """The numbers under `keys`."""
        values = tuple(self._get(key, "a number") for key in keys)
        for key, value in zip(keys, values, strict=True):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise self._wrong(key, "a number")
        return values

    def texts(self, key: str) -> list[str]:
        """The list of strings under `key`, without space around them."""
        values = self._get(key, "a list of texts")
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of texts")
        return [value.strip() for value in values]

    def rows(self, key: str) -> "list[JsonRecord]":
        """The list of objects under `key`."""
        values = self._get(key, "a list of objects")
        if not isinstance(values, list):
            raise self._wrong(key, "a list of objects")
        return [as_record(value, f"{self.where}, {key} {n}") for n, value in enumerate(values, 1)]

    def _get(self, key: str, kind: str) -> Any:
        if key not in self.value:
            raise InputError(f"{self.where}: {key!r}, {kind}, is missing.")
        return self.value[key]

    def _wrong(self, key: str, kind: str) -> InputError:
        return InputError(f"{self.where}: {key!r} is {self.value[key]!r:.80}, not {kind}.")


def as_record(value: Any, where: str) -> JsonRecord:
    """Raises `InputError` unless `value` is an object."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {value!r:.80}, not an object with keys.")
    return JsonRecord(value, where)


# ------------------------------------------------------------------ options


def published_file(source: Path, given: str | None, name: str) -> Path:
    """The file to read: what the user gave, else the published name, in the folder `source`.

    Raises:
        InputError: `source` is not a folder, or has no such file.
    """
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; give the one with the published files.")
    path = source / (name if given is None else str(given))
    if not path.is_file():
        raise InputError(
            f"{path} is not there. If the published file has another name here, give it as an "
            "option; `owl2 data convert --list` says what is read."
        )
    return path


def known_split(name: str, split: object, splits: dict[str, str]) -> str:
    """What `splits` holds for `split`. Raises `InputError` for another, a test split above all."""
    refuse_test(split, f"split={split}")
    return look_up(f"split of the data set {name}", split, splits)


def refuse_test(split: object, where: str) -> None:
    """Raises `InputError` where a split, as the user or a file names it, is a test split."""
    if isinstance(split, str) and "test" in split.lower():
        raise InputError(f"{where}: {split!r} is a test split, which is for evaluation only.")


def require_split(said: object, wanted: str, where: str) -> None:
    """Raises `InputError` where a file or row says that it is of another split than is wanted.

    `said`: what it says; None: nothing.
    """
    refuse_test(said, where)
    if said not in (None, wanted):
        raise InputError(f"{where} is of the split {said!r:.40}, not {wanted!r}.")


def check_max_rounds(most: object) -> None:
    """Raises `InputError` unless `most`, of the rounds of a conversation, is a number from 1 on."""
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise InputError(f"`most` is {most!r}; it must be a number of rounds from 1 on.")


# ------------------------------------------------------------------ files


def json_object(path: Path) -> JsonRecord:
    """A file that holds one object. Raises `InputError`: unreadable, or something else in it."""
    try:
        return as_record(json.loads(_read(path)), str(path))
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from error


def json_rows(path: Path) -> Iterator[JsonRecord]:
    """The objects of a file that holds a list of them.

    Only the text is in memory at once: as objects, the largest files would take ten times that.

    Raises:
        InputError: unreadable, or something else in it (as soon as it is met).
    """
    for number, (_, value) in enumerate(_items(path, "[", "]"), start=1):
        yield as_record(value, f"{path}, row {number}")


def json_entries(path: Path) -> Iterator[tuple[str, JsonRecord]]:
    """(key, object) of a file that holds an object of objects; otherwise as `json_rows`."""
    for key, value in _items(path, "{", "}"):
        yield key, as_record(value, f"{path}, {key!r}")


def json_lines(path: Path) -> Iterator[JsonRecord]:
    """The objects of a file with one a line. Raises `InputError` as `json_rows`."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield as_record(_parsed(line, where), where)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error


def _items(path: Path, opening: str, closing: str) -> Iterator[tuple[str, Any]]:
    """The elements of the list, or the entries of the object, that a file holds, one by one."""
    text = _read(path)
    place = _after_space(text, 0)
    if text[place : place + 1] != opening:
        kind = "a list" if opening == "[" else "an object"
        raise InputError(f"{path} holds something else than {kind}, or is not JSON.")
    place = _after_space(text, place + 1)
    if text[place : place + 1] == closing:
        raise InputError(f"{path} holds nothing.")
    key = ""
    while True:
        try:
            if opening == "{":
                key, place = _key(text, place)
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, error) from error
        yield key, value
        place = _after_space(text, place)
        mark = text[place : place + 1]
        if mark == closing:
            if _after_space(text, place + 1) != len(text):
                raise InputError(f"{path} goes on after its end, character {place}.")
            return
        if mark != ",":
            raise InputError(f"{path} is not JSON: cut short or damaged at character {place}.")
        place = _after_space(text, place + 1)


def _key(text: str, place: int) -> tuple[str, int]:
    key, place = _DECODER.raw_decode(text, place)
    place = _after_space(text, place)
    if not isinstance(key, str) or text[place : place + 1] != ":":
        raise ValueError(f"a key is due at character {place}")
    return key, _after_space(text, place + 1)


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> InputError:
    if isinstance(error, OSError):
        return InputError(f"{path} cannot be read: {error.strerror}.")
    return InputError(f"{path} is not a text file in UTF-8: {error}")


def _not_json(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not JSON: {error}")
