"""Processes that share work: their ranks, and heartbeat files that show which ones are alive."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from owl2.errors import ErrorCode, InputError
from owl2.files import translate_write_errors

Item = TypeVar("Item")

HEARTBEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 30.0  # without a heartbeat


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
        try:
            rank = int(environment.get("RANK", 0))
            size = int(environment.get("WORLD_SIZE", 1))
            local_rank = int(environment.get("LOCAL_RANK", rank))
        except ValueError as error:
            raise InputError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be integers: {error}.",
                ErrorCode.INVALID_TYPE,
            ) from error
        if not 0 <= rank < size:
            raise InputError(
                f"RANK is {rank} and WORLD_SIZE {size}. RANK must be from 0 to WORLD_SIZE - 1.",
                ErrorCode.INVALID_VALUE,
            )
        return cls(rank, size, local_rank)

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """Every `world_size`-th item, so that shards are alike where items are sorted."""
        return list(items[self.rank :: self.world_size])

    def device(self, device: str) -> str:
        """``cuda`` becomes the GPU of this process if there are several processes."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.world_size > 1 else device


@contextmanager
def heartbeat(directory: Path, worker: WorkerRank) -> Iterator[None]:
    """Write the time into a file every few seconds, for `PeerMonitor` of process 0.

    Process 0, which no process waits for, removes the files of all processes at the start, and at
    the end unless there was an error.

    Raises:
        InputError: The file cannot be written.
    """
    if worker.rank == 0:
        _remove_heartbeats(directory)
        yield
        _remove_heartbeats(directory)
        return
    path = _heartbeat_file(directory, worker.rank)
    stop = threading.Event()

    def beat_until_stopped() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a full disk or a file server that restarts: try again
                path.write_text(str(time.time_ns()))

    with translate_write_errors(path):
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(str(time.time_ns()))
    thread = threading.Thread(target=beat_until_stopped, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _remove_heartbeats(directory: Path) -> None:
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
