"""Records of several processes in JSONL files: resumable, without communication.

::

    DIR/NAME.part-0.jsonl, DIR/NAME.part-1.jsonl, ...   one file per process, one record per line
    ──when every key has a record──► process 0 reads them in the order of the keys

- The first line of a part is ``{"settings": ...}``. Records with other settings are not mixed.
- A record is written by one call, so that a kill can only truncate the last line of a part. The
  truncated line is removed when the part is opened again.
- A run resumes from all parts, whatever the number of processes that wrote them.
- Processes communicate through the files only, so a shared directory is enough. `heartbeat` lets
  process 0 detect a process that died.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from glob import escape
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal

from owl2.errors import ErrorCode, InputError
from owl2.files import translate_write_errors
from owl2.workers import PeerMonitor, WorkerRank

Record = dict[str, Any]

TIMEOUT_SECONDS = 900.0  # without a new record of another process
POLL_SECONDS = 0.5


class ShardedJsonl:
    """The records of one task; this process appends to its own part. A context manager.

    Only the positions of the records are in memory.

    Args:
        path: ``DIR/NAME.jsonl``, which names the parts ``DIR/NAME.part-RANK.jsonl``.
        settings: JSON values on which the records depend.
        worker: This process.
        key: The field that identifies a record, or a function that returns its key.
        retry: A record with this field does not count as final: a later run computes it again.
        on_other_settings: For an existing part with other settings: "restart" discards its
            records, "error" raises.
        finished: A file with records of an earlier run, without a line for the settings.
        is_current: Records for which it returns False are ignored, such as those of a changed file.
            Default: all records are current.

    Attributes:
        restarted: Whether records with other settings were discarded.

    Raises:
        InputError: A part cannot be written, or another process has opened it; an existing part
            has other settings or a line that is not a record ("error").
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        worker: WorkerRank,
        key: str | Callable[[Record], str] = "key",
        retry: str | None = None,
        on_other_settings: Literal["restart", "error"] = "restart",
        finished: Path | None = None,
        is_current: Callable[[Record], bool] | None = None,
    ) -> None:
        self.path = path.with_name(f"{path.stem}.part-{worker.rank}.jsonl")
        self.restarted = False
        self._base = path
        # As JSON, so that tuples compare equal to lists.
        self._settings = json.loads(json.dumps(settings, default=str))
        self.worker, self._retry = worker, retry
        self._key = key if callable(key) else itemgetter(key)
        self._restart, self._finished = on_other_settings == "restart", finished
        self._is_current = is_current
        # The file of the newest record of each key, and its first byte there.
        self._final: dict[str, tuple[Path, int]] = {}
        self._failed: dict[str, tuple[Path, int]] = {}  # to be retried
        self._readers: dict[Path, BinaryIO] = {}
        self._offsets: dict[Path, int] = {}  # bytes of each file that are indexed
        with ExitStack() as stack:
            with translate_write_errors(self.path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(self.path.open("ab", buffering=0))
            _lock(self._file, self.path)
            stack.callback(self.close)
            remove_torn_line(self.path)
            self.refresh()
            valid = self._offsets.get(self.path, 0)
            if self._restart and valid < os.fstat(self._file.fileno()).st_size:
                self.restarted = valid == 0
                self._file.truncate(valid)
            stack.pop_all()

    def __enter__(self) -> "ShardedJsonl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        """Whether the key has a final record, of any process."""
        return key in self._final

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, so that they survive this process.

        Raises:
            InputError: The disk is full.
        """
        header = [{"settings": self._settings}] if self._is_empty else []
        lines = b"".join(_to_line(row) for row in (*header, *records))
        with translate_write_errors(self.path):
            while lines:  # a write is incomplete only if the disk is full; the next one raises
                lines = lines[self._file.write(lines) :]

    def refresh(self) -> None:
        """Index the complete lines that were added to all files."""
        if self._finished is not None and self._finished.is_file():
            self._index(self._finished)
        for path in _parts(self._base):
            self._index(path)

    def wait(self, keys: Sequence[str]) -> None:
        """Wait until every key has a record, of any process.

        Args:
            keys: Of all records; ``WorkerRank.shard(keys)`` are those of a process.

        Raises:
            InputError: A process died and its records are missing; no process added a record for
                `TIMEOUT_SECONDS`; there is only this process and a record is missing.
        """
        monitor = PeerMonitor(self.path.parent, self.worker)
        previous, changed = -1, time.monotonic()
        while True:
            dead = monitor.dead_ranks()  # before the records: a heartbeat ends after the last one
            self.refresh()
            existing = self._final.keys() | self._failed.keys()
            missing = [index for index, key in enumerate(keys) if key not in existing]
            if not missing:
                return
            if len(missing) != previous:
                previous, changed = len(missing), time.monotonic()
            reason = None
            if lost := dead & {index % self.worker.world_size for index in missing}:
                reason = f"process {min(lost)} ended"
            elif self.worker.world_size == 1 or time.monotonic() - changed > TIMEOUT_SECONDS:
                reason = f"no process has added any for {TIMEOUT_SECONDS:.0f} s"
            if reason is not None:
                raise InputError(
                    f"{self._base.stem}: {len(missing)} records of {len(keys)} are missing, and "
                    f"{reason}. The same command resumes from the existing records.",
                    ErrorCode.PROCESS_FAILED,
                )
            time.sleep(POLL_SECONDS)

    def record(self, key: str) -> Record:
        """The newest record of a key; a final one replaces one to be retried."""
        path, offset = self._final.get(key) or self._failed[key]
        if path not in self._readers:
            self._readers[path] = path.open("rb")
        self._readers[path].seek(offset)
        record: Record = json.loads(self._readers[path].readline())
        return record

    def close(self) -> None:
        """Close all files. A part without records is removed."""
        if not self._file.closed and self._is_empty:
            self.path.unlink(missing_ok=True)
        for file in (self._file, *self._readers.values()):
            file.close()

    @property
    def _is_empty(self) -> bool:
        return os.fstat(self._file.fileno()).st_size == 0

    def _index(self, path: Path) -> None:
        offset = self._offsets.setdefault(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it
                    break
                try:
                    self._add(path, offset, line)
                except InputError:
                    if self._restart:
                        return  # read again next time: its process may have restarted it
                    raise
                offset += len(line)
                self._offsets[path] = offset

    def _add(self, path: Path, offset: int, line: bytes) -> None:
        is_header = offset == 0 and path != self._finished
        try:
            row = json.loads(line)
            value = row["settings"] if is_header else str(self._key(row))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} contains a line that owl2 did not write, at byte {offset}. Move it away.",
                ErrorCode.INVALID_FORMAT,
            ) from error
        if is_header and value != self._settings:
            raise settings_conflict(path, self._settings, value)
        if not is_header and (self._is_current is None or self._is_current(row)):
            records = self._failed if self._retry in row else self._final
            records[value] = path, offset


def remove_parts(path: Path) -> None:
    """Remove the parts of all processes, whose names `path` determines as in `ShardedJsonl`."""
    for part in _parts(path):
        part.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{escape(path.stem)}.part-*.jsonl"))


def settings_conflict(path: Path, settings: Mapping[str, Any], other: Any) -> InputError:
    """The error for a file that was written with other settings; names those that differ."""
    other = other if isinstance(other, dict) else {}
    names = [name for name in {**settings, **other} if other.get(name) != settings.get(name)]
    return InputError(
        f"{path} was written with another {' and '.join(names) or 'version of owl2'}. Choose "
        "another output, or move it away.",
        ErrorCode.RESUME_MISMATCH,
    )


# ------------------------------------------------------------------ files


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with readable characters, on one line without `indent`.

    Lone surrogates, with which pyarrow, pandas and other readers reject a file, become readable
    text: the six characters ``\\udce9``.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\\\u{ord(found[0]):x}", text)


def _to_line(row: Mapping[str, Any]) -> bytes:
    """A line of a part, from which `json.loads` returns the same text, also lone surrogates."""
    try:
        return f"{json.dumps(row, ensure_ascii=False, default=str)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row, default=str)}\n".encode()


def remove_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a kill leaves behind."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _lock(file: BinaryIO, path: Path) -> None:
    with suppress(ImportError):  # Windows has no fcntl
        fcntl: Any = import_module("fcntl")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"Another process writes {path.name}. Processes that share the work need different "
                "values of RANK, from 0 to WORLD_SIZE - 1.",
                ErrorCode.CONFLICT,
            ) from error
