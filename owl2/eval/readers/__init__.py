"""Benchmarks in the format in which they are published → questions. A module a family.

A reader is a function of a `Source`. It yields Questions, and a Broken for a row that cannot be
asked; for a file that is missing it raises `MissingData`. It opens no image.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, as_record


class MissingData(InputError):
    """A benchmark's file that is not there, or a package that is needed to read it."""


@dataclass
class Source:
    """Where a benchmark's files are, and how it is to be asked.

    Attributes:
        folders: to look into, in this order: the benchmark's own, then the one that several share
            (COCO's images).
        prompt: with ``{question}`` in it; readers of captions take it as it is.
        options: the recipe's, such as a split.
        advice: where to get it, and under which licence, for `MissingData`.
        read: files that the reader has used, for the data's fingerprint.
    """

    folders: tuple[Path, ...]
    prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    advice: str = ""
    read: list[Path] = field(default_factory=list)

    def file(self, *names: str) -> Path:
        """The first of these names (relative, ``*`` allowed) that is a file.

        Raises:
            MissingData: none is; says which, and where to get it.
        """
        if not self.folders:
            raise MissingData(
                f"{names[0]} is needed: give --data DIR, the folder that it is in. {self.advice}"
            )
        for folder in self.folders:
            for name in names:
                for path in sorted(folder.glob(name)):
                    if path.is_file():
                        if path not in self.read:
                            self.read.append(path)
                        return path
        raise MissingData(
            f"{self.folders[0] / names[0]} is not there"
            f"{'' if len(names) == 1 else ' (nor ' + ', '.join(names[1:]) + ')'}. {self.advice}"
        )

    def name(self, path: Path) -> str:
        """Of a file that was read: from the folder on in which it was found, as many benchmarks
        have files of the same name."""
        for folder in self.folders:
            if path.is_relative_to(folder):
                return path.relative_to(folder).as_posix()
        return path.name

    def image(self, *names: str) -> Path | None:
        """The first of these names that is there; None: no such image."""
        for folder in self.folders:
            for name in names:
                if (folder / name).exists():
                    return folder / name
        return None

    def ask(self, question: str) -> str:
        """The question in the prompt's words."""
        return self.prompt.replace("{question}", question)


Reader = Callable[[Source], Iterable[Question | Broken]]


def find_reader(path: str) -> Reader:
    """The reader that a recipe names: ``MODULE.FUNCTION`` in this package, such as "vqa.vqav2"."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


def each(
    rows: Iterable[JsonRecord | Broken], make: Callable[[int, JsonRecord], Question | Broken]
) -> Iterator[Question | Broken]:
    """A question a row; a row that is not as published is broken, and the others go on.

    Args:
        make: of a row's number, from 1, and the row; what it raises tells what is wrong with it.

    Raises:
        MissingData: what `make` raises of that kind.
        InputError: not one of the rows is as published: it is another file.
    """
    first: InputError | None = None
    some = False
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, Broken):
                raise InputError(row.reason)
            made = make(number, row)
        except MissingData:
            raise
        except InputError as error:
            first = first or error
            place = row.id if isinstance(row, Broken) else row.where.rpartition(", ")[2]
            yield Broken(place, str(error))
        else:
            some = True
            yield made
    if first is not None and not some:
        raise first


def lines(path: Path) -> Iterator[JsonRecord | Broken]:
    """The objects of a file with one a line; a line that is none is broken.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(line, path, f"line {number}")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _row(line: bytes, path: Path, place: str) -> JsonRecord | Broken:
    where = f"{path}, {place}"
    try:
        return as_record(json.loads(line.decode("utf-8-sig")), where)
    except InputError as error:
        return Broken(place, str(error))
    except (ValueError, RecursionError) as error:
        return Broken(place, f"{where}: not JSON: {error}")


def sorted_out(items: Iterable[Question | Broken]) -> tuple[list[Question], list[Broken]]:
    """Questions and what is broken; ids that come twice are broken, too."""
    questions: list[Question] = []
    broken: list[Broken] = []
    ids: set[str] = set()
    for item in items:
        if isinstance(item, Broken):
            broken.append(item)
        elif item.id in ids:
            broken.append(Broken(item.id, "an earlier question has the same id"))
        else:
            ids.add(item.id)
            questions.append(item)
    return questions, broken


def with_image(path: Path, words: str) -> list[dict[str, Any]]:
    """A user's turn: the image, then the words, nothing between (SPEC 1.5)."""
    return with_images([path], words)


def with_images(paths: Iterable[Path], words: str) -> list[dict[str, Any]]:
    """A user's turn with several images or frames in order."""
    parts: Iterator[dict[str, Any]] = ({"type": "image", "path": str(path)} for path in paths)
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]
