"""How an evaluation is watched: a bar on a terminal, elsewhere a line every few seconds."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_SECONDS = 5.0


class Watch:
    """Counts answers and shows how many there are; a context manager.

    Args:
        unit: what is answered, in the plural.

    Attributes:
        done: answers so far, with those of an earlier start.
    """

    def __init__(self, console: Console, what: str, unit: str = "questions") -> None:
        self.done = 0
        self._console = console
        self._what = what
        self._unit = unit
        self._total = self._before = 0
        self._began = self._last_plain = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, total: int, before: int) -> None:
        """So many answers are wanted, of which so many were there before."""
        self._total, self._before, self.done = total, before, before
        self._began = self._last_plain = time.perf_counter()
        if before:
            self._say(f"{self._what} {before:>6}/{total}  answered earlier; going on")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self._what, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
                refresh_per_second=2,
            )
            self._bar.add_task("", total=total, completed=before, state="")
            self._bar.start()

    def add(self, count: int) -> None:
        """So many more answers."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, state=self._state())
            return
        now = time.perf_counter()
        if self.done == self._total or now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            self._say(f"{self._what} {self.done:>6}/{self._total}  {self._state()}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _state(self) -> str:
        seconds = time.perf_counter() - self._began
        new = self.done - self._before
        left = timedelta(seconds=round(seconds / new * (self._total - self.done)))
        return f"{new / max(seconds, 1e-9):,.1f} {self._unit}/s  {left} left"
