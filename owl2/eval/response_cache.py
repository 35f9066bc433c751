"""Answers as they are made, a line each: what a killed evaluation goes on from.

A file of a process and round (a task with its images, or blind) begins with the settings on which
answers depend; those made under other settings are not taken up. A row has the key of its question
(`key_of`), so that an answer to what has changed since then is not taken up either.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.heartbeat import Others
from owl2.eval.samples import Question
from owl2.eval.sharding import Team
from owl2.processing.chat_template import has_lone_surrogate

Row = dict[str, Any]

PATIENCE = 900.0  # seconds without a new answer of another process, before it is given up
LOOK_SECONDS = 0.5


class Journal:
    """One round's answers, of all processes; this process adds to its own file.

    Args:
        folder: of the answers.
        name: the round's.
        settings: on which the answers depend; JSON.

    Attributes:
        began_anew: whether answers of other settings were there, which are gone now.

    Raises:
        InputError: a file that cannot be written.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], team: Team) -> None:
        self._folder, self._name, self._team = folder, name, team
        self._head = json.dumps({"settings": settings}, sort_keys=True, default=str)
        self.path = folder / f"{name}.part{f'-{team.rank}' if team.rank else ''}.jsonl"
        rows, length = self._read(self.path)
        self.began_anew = rows is None and self.path.is_file()
        try:
            if rows is None:
                self.path.write_text(self._head + "\n", encoding="utf-8")
            else:
                # A kill may leave half a line at the end.
                os.truncate(self.path, length)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}.") from error

    def known(self) -> dict[str, Row]:
        """All rows so far by their keys, those of other processes, too."""
        found: dict[str, Row] = {}
        for path in self._parts():
            rows, _ = self._read(path)
            found |= {row["key"]: row for row in rows or []}
        return found

    def add(self, rows: Iterable[Row]) -> None:
        """Write them down, so that they outlive this process."""
        lines = "".join(f"{json_text(row)}\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def all(self, keys: Sequence[str]) -> list[Row]:
        """The rows of these keys, as soon as the other processes have theirs.

        Raises:
            InputError: a process has died whose answers are missing, or nobody has added any for
                `PATIENCE` seconds.
        """
        others = Others(self._folder, self._team)
        seen, changed = -1, time.monotonic()
        while True:
            dead = others.dead()  # before the answers: the last ones come before the last sign
            size = sum(path.stat().st_size for path in self._parts())
            if size != seen:
                seen, changed = size, time.monotonic()
                rows = self.known()
                missing = [place for place, key in enumerate(keys) if key not in rows]
                if not missing:
                    return [rows[key] for key in keys]
            if lost := dead & {self._team.whose(place) for place in missing}:
                raise self._missing(missing, keys, f"process {min(lost)} has ended or was killed")
            if self._team.size == 1 or time.monotonic() - changed > PATIENCE:
                why = f"nobody has written one for {PATIENCE:.0f} s"
                raise self._missing(missing, keys, why)
            time.sleep(LOOK_SECONDS)

    def _missing(self, missing: Sequence[int], keys: Sequence[str], why: str) -> InputError:
        return InputError(
            f"{self._name}: {len(missing)} answers of {len(keys)} are missing, and {why}. The same "
            "command goes on from what is there."
        )

    def remove(self) -> None:
        """All parts of the round, once its answers are elsewhere."""
        remove_parts(self._folder, self._name)

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{escape(self._name)}.part*.jsonl"))

    def _read(self, path: Path) -> tuple[list[Row] | None, int]:
        """Whole rows, and the bytes that they take; None: no such file, or of other settings."""
        if not path.is_file():
            return None, 0
        data = path.read_bytes()
        length = data.rfind(b"\n") + 1
        # Not `splitlines`, which takes more than line feeds for ends of lines.
        head, *lines = data[:length].decode("utf-8", errors="replace").split("\n")[:-1] or [""]
        if head != self._head:
            return None, 0
        try:
            return [json.loads(line) for line in lines], length
        except ValueError:
            return None, 0  # not written by us: begun anew


def remove_parts(folder: Path, name: str) -> None:
    """Of a round, of however many processes."""
    for path in folder.glob(f"{escape(name)}.part*.jsonl"):
        path.unlink(missing_ok=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for people, all on one line if not indented; what no file can hold is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    if has_lone_surrogate(text):
        text = json.dumps(value, indent=indent, default=str)
    return text


def key_of(question: Question) -> str:
    """Of all that decides what the answer is, but for the settings; of an image's file its path,
    size and time of change."""
    told = [question.id, question.text, _told(question.messages), question.facts, question.expected]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:32]


def _told(messages: Any) -> Any:
    if isinstance(messages, list):
        return [_told(item) for item in messages]
    if not isinstance(messages, dict):
        return messages
    told = {name: _told(value) for name, value in messages.items()}
    path = messages.get("path")
    if isinstance(path, str) and os.path.isfile(path):
        state = os.stat(path)
        told["state"] = [state.st_size, state.st_mtime_ns]
    return told
