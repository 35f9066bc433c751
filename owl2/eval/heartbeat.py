"""Signs of life: processes that evaluate together see soon that one of them has died.

Each but the first, which nobody waits for, writes the time into a file of its own beside the
answers, every few seconds. Who waits looks whether that text *changes*, by its own clock, so clocks
of several machines may differ, and a process that was killed needs to say nothing.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from owl2.errors import InputError
from owl2.eval.sharding import Team

BEAT_SECONDS = 2.0
QUIET_SECONDS = 30.0  # without a sign: the process has died


@contextmanager
def beating(folder: Path, team: Team) -> Iterator[None]:
    """While the block lasts, the first process can see that this one lives.

    The first one removes the signs of earlier evaluations instead; the living write theirs anew.

    Raises:
        InputError: the folder cannot be made or written.
    """
    if team.rank == 0:
        forget(folder)
        yield
        return
    path = _sign(folder, team.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _beat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error
    done = threading.Event()
    thread = threading.Thread(target=_go_on, args=(path, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def forget(folder: Path) -> None:
    """Remove all signs."""
    for path in folder.glob(_sign(folder, "*").name):
        path.unlink(missing_ok=True)


class Others:
    """The other processes, as seen from now on by one that waits for them."""

    def __init__(self, folder: Path, team: Team) -> None:
        self._signs = {rank: _sign(folder, rank) for rank in range(team.size) if rank != team.rank}
        self._seen: dict[int, tuple[str, float]] = {}  # the text, and since when it is that one

    def dead(self) -> set[int]:
        """Ranks of those that have given signs, and none any more for `QUIET_SECONDS`.

        One that has not begun yet is not among them.
        """
        now = time.monotonic()
        for rank, path in self._signs.items():
            try:
                text = path.read_text()
            except FileNotFoundError:
                continue
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = text, now
        return {rank for rank, (_, since) in self._seen.items() if now - since > QUIET_SECONDS}


def _sign(folder: Path, rank: int | str) -> Path:
    return folder / f"process-{rank}.alive"


def _beat(path: Path) -> None:
    path.write_text(str(time.time_ns()))


def _go_on(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        try:
            _beat(path)
        except OSError:
            continue  # a full disk, a server of files that restarts: the next one may come through
