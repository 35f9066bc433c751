"""Published files of a benchmark → samples.

::

    files ──rows.read_rows, or a function in special.py──► rows ──fields.read_samples──► samples

`task_configs` describes the files and the columns of each benchmark. No image is opened.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from owl2.errors import ErrorCode, InputError
from owl2.eval.task_config import DataFiles

NO_FILES = DataFiles(files=[], origin="", license="")


@dataclass
class EvalData:
    """The files of a benchmark on this machine, and the prompt.

    Attributes:
        directories: Searched in this order: that of the benchmark, and the one that several
            benchmarks share (the images of COCO).
        prompt: Contains ``{question}``, or is the question. See `TaskConfig.prompt`.
        has_task_format: Whether the chat format and the white space of the questions are those of
            the task (`TaskConfig.assistant_space`), not of the checkpoint.
        published: The patterns and the format of the files.
        advice: Where to get the files, for error messages.
        files: Files that were read, for the fingerprint of the data.
        remarks: Found by the reader, for the report.
    """

    directories: tuple[Path, ...]
    prompt: str
    has_task_format: bool = True
    published: DataFiles = NO_FILES
    advice: str = ""
    files: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def paths(self, patterns: str) -> list[Path]:
        """The files of the first of these patterns (separated by " or ") that exist, sorted.

        Raises:
            InputError: None exists (FILE_NOT_FOUND).
        """
        for directory in self.directories:
            for pattern in (patterns, *patterns.split(" or ")):
                found = [literal] if (literal := directory / pattern).is_file() else None
                paths = found or sorted(filter(Path.is_file, self.matches(directory, pattern)))
                if paths:
                    self.files += [path for path in paths if path not in self.files]
                    return paths
        place = self.directories[0] / patterns if self.directories else f"{patterns} (with --data)"
        raise InputError(f"{place} does not exist. {self.advice}", ErrorCode.FILE_NOT_FOUND)

    def matches(self, directory: Path, pattern: str) -> Iterator[Path]:
        """The paths in `directory` with this pattern that are part of the benchmark."""
        names = self.published.names
        return (path for path in directory.glob(pattern) if names is None or path.stem in names)

    def find(self, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path | None:
        """The first of these relative names that exists in one of the folders."""
        for directory in self.directories or ("",):
            for name in map(os.path.expanduser, names):
                for folder in folders:  # os.path is much faster than pathlib
                    if os.path.exists(path := os.path.join(directory, folder, name)):
                        return Path(path)
        return None

    def relative_name(self, path: Path) -> str:
        """The name of a file relative to the directory that contains it."""
        for directory in self.directories:
            if path.is_relative_to(directory):
                return path.relative_to(directory).as_posix()
        return path.name
