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
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

from owl2.errors import ErrorCode, InputError

Item = TypeVar("Item")
Record = dict[str, Any]

HEARTBEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 30.0  # without a heartbeat
TIMEOUT_SECONDS = 900.0  # without a new record of another process
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerRank:
    """The rank of this process among those that share the work.

    Attributes:
        rank: From 0 to `world_size` - 1.
        world_size: Number of processes.
        local_rank: Rank on this machine, which selects the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "WorkerRank":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process.

        Raises:
            InputError: A value is not an integer, or the rank is out of range.
        """
        given = {k: v for k, v in environment.items() if k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        try:
            values = {name: int(value) for name, value in given.items()}
        except ValueError as error:
            raise InputError(f"Not an integer: {given}", ErrorCode.INVALID_TYPE) from error
        rank, size = values.get("RANK", 0), values.get("WORLD_SIZE", 1)
        if not 0 <= rank < size:
            raise InputError(
                f"RANK is {rank} and WORLD_SIZE {size}. RANK must be from 0 to WORLD_SIZE - 1.",
                ErrorCode.INVALID_VALUE,
            )
        return cls(rank, size, values.get("LOCAL_RANK", rank))

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """Every `world_size`-th item, so that shards are alike where items are sorted."""
        return list(items[self.rank :: self.world_size])

    def owner(self, index: int) -> int:
        """The rank whose shard contains the item with this index."""
        return index % self.world_size

    def device(self, device: str) -> str:
        """``cuda`` becomes the GPU of this process if there are several processes."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.world_size > 1 else device


class _Location(NamedTuple):
    path: Path
    offset: int  # of the record's line, in bytes
    is_final: bool  # not to be computed again


class ShardedJsonl:
    """The records of one task; this process appends to its own part. A context manager.

    Only the locations of the records are in memory.

    Args:
        path: ``DIR/NAME.jsonl``, which names the parts ``DIR/NAME.part-RANK.jsonl``.
        settings: JSON values on which the records depend.
        worker: This process.
        key: The field that identifies a record.
        retry: A record with this field does not count as final: a later run computes it again.
        on_other_settings: For an existing part with other settings: "restart" discards its
            records, "error" raises.
        finished: A file with records of an earlier run, without a line for the settings.

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
        key: str = "key",
        retry: str | None = None,
        on_other_settings: Literal["restart", "error"] = "restart",
        finished: Path | None = None,
    ) -> None:
        self.path = path.with_name(f"{path.stem}.part-{worker.rank}.jsonl")
        self.restarted = False
        self._name = path.stem
        # As JSON, so that tuples compare equal to lists.
        self._settings = json.loads(json.dumps(settings, default=str))
        self._worker, self._key, self._retry = worker, key, retry
        self._restart, self._finished = on_other_settings == "restart", finished
        self._locations: dict[str, _Location] = {}
        self._offsets: dict[Path, int] = {}  # bytes of each file that are indexed
        self._readers: dict[Path, BinaryIO] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise _write_error(self.path, error) from error
        try:
            _lock(self._file, self.path)
        except BaseException:
            self._file.close()
            raise
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ShardedJsonl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        """Whether the key has a final record, of any process."""
        location = self._locations.get(key)
        return location is not None and location.is_final

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, so that they survive this process.

        Raises:
            InputError: The disk is full.
        """
        header = [{"settings": self._settings}] if self._is_empty else []
        lines = "".join(f"{to_json(row)}\n" for row in (*header, *records)).encode()
        try:
            while lines:  # a write is incomplete only if the disk is full; the next one raises
                lines = lines[self._file.write(lines) :]
        except OSError as error:
            raise _write_error(self.path, error) from error

    def refresh(self) -> None:
        """Index the complete lines that were added to all files."""
        if self._finished is not None and self._finished.is_file():
            self._index(self._finished)
        for path in self._parts():
            self._index(path)

    def wait(self, keys: Sequence[str]) -> None:
        """Wait until every key has a record, of any process.

        Args:
            keys: Of all records; ``WorkerRank.shard(keys)`` are those of a process.

        Raises:
            InputError: A process died and its records are missing; no process added a record for
                `TIMEOUT_SECONDS`; there is only this process and a record is missing.
        """
        monitor = PeerMonitor(self.path.parent, self._worker)
        previous, changed = -1, time.monotonic()
        while True:
            dead = monitor.dead_ranks()  # before the records: a heartbeat ends after the last one
            self.refresh()
            missing = [index for index, key in enumerate(keys) if key not in self._locations]
            if not missing:
                return
            if len(missing) != previous:
                previous, changed = len(missing), time.monotonic()
            reason = None
            if lost := dead & {self._worker.owner(index) for index in missing}:
                reason = f"process {min(lost)} ended"
            elif self._worker.world_size == 1 or time.monotonic() - changed > TIMEOUT_SECONDS:
                reason = f"no process has added any for {TIMEOUT_SECONDS:.0f} s"
            if reason is not None:
                raise InputError(
                    f"{self._name}: {len(missing)} records of {len(keys)} are missing, and "
                    f"{reason}. The same command resumes from the existing records.",
                    ErrorCode.PROCESS_FAILED,
                )
            time.sleep(POLL_SECONDS)

    def record(self, key: str) -> Record:
        """The newest record of a key; a final one replaces one to be retried."""
        location = self._locations[key]
        if location.path not in self._readers:
            self._readers[location.path] = location.path.open("rb")
        reader = self._readers[location.path]
        reader.seek(location.offset)
        record: Record = json.loads(reader.readline())
        return record

    def remove(self) -> None:
        """Remove all parts."""
        for path in self._parts():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files. A part without records is removed."""
        if not self._file.closed and self._is_empty:
            self.path.unlink(missing_ok=True)
        for file in (self._file, *self._readers.values()):
            file.close()

    @property
    def _is_empty(self) -> bool:
        return os.fstat(self._file.fileno()).st_size == 0

    def _resume(self) -> None:
        remove_torn_line(self.path)
        self.refresh()
        valid = self._offsets.get(self.path, 0)
        if self._restart and valid < os.fstat(self._file.fileno()).st_size:
            self.restarted = valid == 0
            self._file.truncate(valid)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{escape(self._name)}.part-*.jsonl"))

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
            value = row["settings"] if is_header else str(row[self._key])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} contains a line that owl2 did not write, at byte {offset}. Move it away.",
                ErrorCode.INVALID_FORMAT,
            ) from error
        if is_header and value != self._settings:
            raise settings_conflict(path, self._settings, value)
        if not is_header and value not in self:
            self._locations[value] = _Location(path, offset, self._retry not in row)


def settings_conflict(path: Path, settings: Mapping[str, Any], other: Any) -> InputError:
    """The error for a file that was written with other settings; names those that differ."""
    other = other if isinstance(other, dict) else {}
    names = [name for name in settings if other.get(name) != settings[name]]
    return InputError(
        f"{path} was written with another {' and '.join(names) or 'version of owl2'}. Choose "
        "another output, or move it away.",
        ErrorCode.RESUME_MISMATCH,
    )


# ------------------------------------------------------------------ heartbeats


@contextmanager
def heartbeat(directory: Path, worker: WorkerRank) -> Iterator[None]:
    """Write the time into a file every few seconds, for `PeerMonitor` of process 0.

    Process 0, which no process waits for, removes the files of earlier runs instead.

    Raises:
        InputError: The file cannot be written.
    """
    if worker.rank == 0:
        remove_heartbeats(directory)
        yield
        return
    path = _heartbeat_file(directory, worker.rank)
    stop = threading.Event()

    def beat_until_stopped() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a full disk or a file server that restarts: try again
                path.write_text(str(time.time_ns()))

    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(str(time.time_ns()))
    except OSError as error:
        raise _write_error(path, error) from error
    thread = threading.Thread(target=beat_until_stopped, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def remove_heartbeats(directory: Path) -> None:
    """Remove the heartbeat files of all processes."""
    for path in directory.glob(_heartbeat_file(directory, "*").name):
        path.unlink(missing_ok=True)


class PeerMonitor:
    """Detects other processes that died.

    It measures with its own clock since when a file is unchanged: other clocks may differ.
    """

    def __init__(self, directory: Path, worker: WorkerRank) -> None:
        ranks = (rank for rank in range(worker.world_size) if rank != worker.rank)
        self._files = {rank: _heartbeat_file(directory, rank) for rank in ranks}
        self._seen: dict[int, tuple[str, float]] = {}  # content, and the time of its last change

    def dead_ranks(self) -> set[int]:
        """Ranks whose heartbeat stopped `DEAD_AFTER_SECONDS` ago, without those not yet started."""
        now = time.monotonic()
        for rank, path in self._files.items():
            with suppress(FileNotFoundError):
                content = path.read_text()
                if rank not in self._seen or self._seen[rank][0] != content:
                    self._seen[rank] = content, now
        return {rank for rank, (_, since) in self._seen.items() if now - since > DEAD_AFTER_SECONDS}


def _heartbeat_file(directory: Path, rank: int | str) -> Path:
    return directory / f"process-{rank}.alive"


# ------------------------------------------------------------------ files


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with readable characters, on one line without `indent`; lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, default=str)
    return text


def remove_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a kill leaves behind."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _write_error(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror}.", ErrorCode.WRITE_FAILED)


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
