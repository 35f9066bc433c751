"""Progress of long loops: a bar on a terminal, a line every few seconds in a log file."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 5.0  # between two lines, where the output is not a terminal


class ProgressReporter:
    """Reports how many items are done, at which rate, and how long the rest will take.

    ::

        with ProgressReporter(console, "vqav2", total=len(samples), unit="questions") as progress:
            for batch in batches:
                progress.advance(len(batch))

    Args:
        console: Where to report.
        description: The task, such as the name of a dataset.
        total: Number of items; None if it is unknown.
        completed: Number of items that an earlier run completed. They do not count for the rate.
        unit: Plural noun for the items.
        transient: Remove the bar from the terminal when the loop ends.
        delay: Seconds before the bar or the first line appears.

    Attributes:
        completed: Number of completed items, including those of an earlier run.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        total: int | None = None,
        completed: int = 0,
        unit: str = "items",
        transient: bool = False,
        delay: float = 0.0,
    ) -> None:
        self.completed = self._resumed = completed
        self._console = console
        self._description = description
        self._total = total
        self._unit = unit
        self._delay = delay
        self._start = self._last_line = time.perf_counter()
        count = (MofNCompleteColumn(),) if total is not None else ()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *count,
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            refresh_per_second=2,
            transient=transient,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, completed=completed, status="")

    def __enter__(self) -> "ProgressReporter":
        if self._resumed:
            self._print_line("resumed")
        if not self._delay:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """Count items as completed.

        Args:
            status: Text at the end of the line; None for the rate and the remaining time.
        """
        self.completed += count
        now = time.perf_counter()
        if now - self._start < self._delay:
            return
        status = self._rate(now - self._start) if status is None else status
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=self.completed, status=status)
        elif self.completed == self._total or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._print_line(status)

    def _print_line(self, status: str) -> None:
        total = "" if self._total is None else f"/{self._total}"
        line = f"{self._description} {self.completed:>6}{total}  {status}"
        self._console.out(line)

    def _rate(self, seconds: float) -> str:
        new = self.completed - self._resumed
        rate = f"{new / max(seconds, 1e-9):,.1f} {self._unit}/s"
        if self._total is None or not new:
            return rate
        remaining = timedelta(seconds=round(seconds / new * (self._total - self.completed)))
        return f"{rate}  {remaining} left"
