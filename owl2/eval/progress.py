"""How an evaluation is watched: a bar on a terminal, elsewhere a line every few seconds."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_SECONDS = 5.0


class Watch:
    """Counts answers and right ones and shows them; a context manager.

    Attributes:
        done, right: answers so far, and those of them that are right.
        seconds: since it was entered.
    """

    def __init__(self, console: Console, what: str, total: int) -> None:
        self.done = self.right = 0
        self._console = console
        self._what = what
        self._total = total
        self._began = self._last_plain = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> "Watch":
        self._began = self._last_plain = time.perf_counter()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self._what, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
                refresh_per_second=2,
            )
            self._bar.add_task("", total=self._total, state="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Wall time since the block began."""
        return time.perf_counter() - self._began

    def add(self, done: int, right: int) -> None:
        """So many more answers, of which so many are right."""
        self.done += done
        self.right += right
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, state=self._state())
            return
        now = time.perf_counter()
        if self.done == self._total or now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            line = f"{self._what} {self.done:>6}/{self._total}  {self._state()}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _state(self) -> str:
        left = self.seconds / self.done * (self._total - self.done)
        return f"{self.right / self.done:.1%} right  {timedelta(seconds=round(left))} left"
