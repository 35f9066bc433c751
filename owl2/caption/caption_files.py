"""The files of a captioning: what each process has written so far, and what comes of it.

::

    captions.part-0.jsonl, captions.part-1.jsonl ... a process each, a line an image, as they come
    ──when every image has one──► captions.jsonl, in order, whole; captions.report.json

A part begins with the settings on which captions depend. A killed process leaves its part behind,
and whoever goes on reads all of them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from owl2.errors import InputError
from owl2.eval.response_cache import json_text
from owl2.eval.sharding import Team
from owl2.files import atomic_file, atomic_write_text

SUFFIX = ".jsonl"
LOOK_SECONDS = 0.5
PATIENCE = 900.0  # seconds without a new line of another process, before it is given up


class Place(NamedTuple):
    """Where an image's newest line is: in which file, from which byte, and whether it is good."""

    file: Path
    start: int
    is_good: bool


class CaptionFiles:
    """All files of one captioning; this process adds to its own part. A context manager.

    Args:
        output: the file that is to hold the captions.
        settings: on which captions depend; JSON.

    Raises:
        InputError: the output is no .jsonl file or was written by something else; other settings;
            another process writes this part.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], team: Team) -> None:
        if output.suffix != SUFFIX:
            raise InputError(f"--output is {output}: give the name of a {SUFFIX} file.")
        self.output = output
        self.report = output.with_name(f"{output.stem}.report.json")
        self._settings = dict(settings)
        self._team = team
        self._part = output.with_name(f"{output.stem}.part-{team.rank}{SUFFIX}")
        self._places: dict[str, Place] = {}
        self._seen: dict[Path, int] = {}  # bytes of each file
        self._handles: dict[Path, BinaryIO] = {}
        self._is_empty = False  # whether this process's part is; not known before it is locked
        self._check_output()
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("ab")
        except OSError as error:
            raise InputError(f"{self._part} cannot be written: {error.strerror}.") from error
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "CaptionFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files, and of this process's part for who goes on."""
        if self._is_empty:
            self._part.unlink(missing_ok=True)
        for file in (self._file, *self._handles.values()):
            file.close()

    def look(self) -> None:
        """Read what was added to all files since the last time."""
        if self.output.is_file():
            self._look_into(self.output)
        for part in self._parts():
            self._look_into(part)

    def has_caption(self, name: str) -> bool:
        """Whether an image has one, by any process."""
        place = self._places.get(name)
        return place is not None and place.is_good

    def add(self, name: str, caption: str | InputError) -> None:
        """Write an image's caption down, or why it has none, so that it outlives this process."""
        if self._is_empty:
            self._write({"settings": self._settings})
            self._is_empty = False
        key = "error" if isinstance(caption, InputError) else "caption"
        self._write({"file_name": name, key: str(caption)})

    def wait(self, names: Sequence[str]) -> None:
        """Until every image has a line, of whichever process.

        Raises:
            InputError: the others have added nothing for `PATIENCE` seconds.
        """
        changed = time.monotonic()
        before = -1
        while True:
            self.look()
            missing = sum(name not in self._places for name in names)
            if not missing:
                return
            if missing != before:
                before, changed = missing, time.monotonic()
            if time.monotonic() - changed > PATIENCE:
                raise InputError(
                    f"{missing} images of {len(names)} have no caption, and the other "
                    f"{self._team.size - 1} processes have made none for {PATIENCE:.0f} s. The "
                    "same command goes on from what is there."
                )
            time.sleep(LOOK_SECONDS)

    def finish(self, names: Sequence[str]) -> dict[str, str]:
        """Write the report and, if there is any caption, the output; remove the parts.

        Returns:
            what was wrong with those that have no caption, by their names.
        """
        bad = {
            name: str(json.loads(self._line(name))["error"])
            for name in names
            if not self.has_caption(name)
        }
        report = {
            "settings": self._settings,
            "images": len(names),
            "captions": len(names) - len(bad),
            "bad": [{"file_name": name, "error": error} for name, error in bad.items()],
        }
        # The report first: an output without one is taken for somebody else's.
        atomic_write_text(self.report, json_text(report, indent=2) + "\n")
        if len(bad) < len(names):
            with atomic_file(self.output) as file:
                file.writelines(self._line(name).decode() for name in names if name not in bad)
        for part in self._parts():
            part.unlink(missing_ok=True)
        return bad

    # -------------------------------------------------------------- what was there before

    def _begin(self) -> None:
        _lock(self._file, self._part)
        whole = self._part.read_bytes().rfind(b"\n") + 1  # a kill may leave half a line
        self._file.truncate(whole)
        self._is_empty = not whole
        self.look()

    def _check_output(self) -> None:
        if not self.output.exists():
            return
        try:
            settings = json.loads(self.report.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.output} is there already, and no {self.report.name} beside it says that "
                "`owl2 caption` wrote it: give another --output, or move it away."
            ) from error
        self._compare(self.output, settings)

    def _compare(self, path: Path, settings: Any) -> None:
        """Refuse captions of another model or prompt."""
        if settings == self._settings:
            return
        others = settings if isinstance(settings, dict) else {}
        names = [name for name in self._settings if others.get(name) != self._settings[name]]
        raise InputError(
            f"{path} holds captions made with another {' and '.join(names) or 'owl2'}: give "
            "another --output, or move it away."
        )

    def _parts(self) -> list[Path]:
        pattern = f"{escape(self.output.stem)}.part-*{SUFFIX}"
        return sorted(self.output.parent.glob(pattern))

    # -------------------------------------------------------------- lines

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(f"{json_text(row)}\n".encode())
        self._file.flush()

    def _look_into(self, path: Path) -> None:
        start = self._seen.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self._take(path, start, line)
                start += len(line)
        self._seen[path] = start

    def _take(self, path: Path, start: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "settings" in row:
                self._compare(path, row["settings"])
            elif not self.has_caption(name := row["file_name"]):
                self._places[name] = Place(path, start, "caption" in row)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} holds a line that `owl2 caption` did not write, at byte {start}: move it "
                "away."
            ) from error

    def _line(self, name: str) -> bytes:
        path, start, _ = self._places[name]
        if path not in self._handles:
            self._handles[path] = path.open("rb")
        self._handles[path].seek(start)
        return self._handles[path].readline()


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a file to this process, until it is closed."""
    with suppress(ImportError):  # Windows has none
        fcntl: Any = import_module("fcntl")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"Another process writes {path.name}. Several share the work if each has its own "
                "RANK, from 0 to WORLD_SIZE - 1."
            ) from error
