"""A run on the terminal: a live panel, or plain lines where the output is a file or a pipe."""

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from owl2.processing.chat_template import IMAGE_TOKEN
from owl2.train.validation import Answer, Look

PLAIN_SECONDS = 5.0
# More redraws a second would cost a small model's steps time.
REDRAWS = 2
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
TEXT_WIDTH = 60


def terminal_view(console: Console, title: str) -> "LivePanel | PlainLines":
    """What fits the console."""
    return LivePanel(console, title) if console.is_terminal else PlainLines(console)


class PlainLines:
    """A line at most every few seconds; a `progress.View`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._steps = 0
        self._first: int | None = None
        self._last = time.perf_counter()

    def begin(self, step: int, steps: int, lines: Sequence[dict[str, Any]]) -> None:
        """See `View`."""
        self._steps = steps

    def step(self, step: int) -> None:
        """See `View`: steps between lines of the log are not told."""

    def log(self, line: dict[str, Any], left: float) -> None:
        """See `View`."""
        now = time.perf_counter()
        due = self._first is None or line["step"] == self._steps
        if not due and now - self._last < PLAIN_SECONDS:
            return
        self._first, self._last = line["step"], now
        self._print(
            f"step {line['step']:>6}/{self._steps}  loss {line['loss']:.4f} "
            f"(smoothed {line['smoothed_loss']:.4f})  rate {line['learning_rate']:.2e}  "
            f"{line['samples_per_second']:.1f} samples/s  {_duration(left)} left"
        )

    def look(self, look: Look) -> None:
        """See `View`."""
        left_out = f", {look.left_out} left out" if look.left_out else ""
        self._print(
            f"step {look.step:>6}/{self._steps}  validation loss {look.loss:.4f} "
            f"({look.samples:,} samples{left_out}, {look.seconds:.1f} s)"
        )
        for answer in look.answers:
            question, wanted, given = _texts(answer)
            self._print(f"  {question}  answers {given!r}, wanted {wanted!r}")

    def close(self) -> None:
        """See `View`."""

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LivePanel:
    """A panel that is drawn anew twice a second; a `progress.View`.

    What is printed or logged meanwhile appears above it.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self._step = self._steps = self._start = 0
        self._began = time.perf_counter()
        self._losses: list[float] = []
        self._line: dict[str, Any] | None = None
        self._left = 0.0
        self._first_look: Look | None = None
        self._look: Look | None = None
        self._open = ExitStack()

    def begin(self, step: int, steps: int, lines: Sequence[dict[str, Any]]) -> None:
        """See `View`."""
        self._step, self._steps, self._start = step, steps, step
        self._losses = [line["loss"] for line in lines]
        self._began = time.perf_counter()
        live = Live(console=self.console, get_renderable=self.render, refresh_per_second=REDRAWS)
        self._open.enter_context(live)
        self._open.enter_context(_logging_above())

    def step(self, step: int) -> None:
        """See `View`."""
        self._step = step

    def log(self, line: dict[str, Any], left: float) -> None:
        """See `View`."""
        self._losses.append(line["loss"])
        self._line, self._left = line, left

    def look(self, look: Look) -> None:
        """See `View`."""
        self._first_look = self._first_look or look
        self._look = look

    def close(self) -> None:
        """See `View`."""
        self._open.close()

    def render(self) -> RenderableType:
        """The panel as it stands."""
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column(ratio=1)
        if self._line is not None:
            for name, value in _rows(self._line, self._losses):
                rows.add_row(name, value)
        if self._look is not None:
            rows.add_row("validation", _looked(self._look, self._first_look))
        for answer in () if self._look is None else self._look.answers:
            rows.add_row("", _shown(answer))
        inside = Group(self._progress(), rows)
        return Panel(inside, title=Text(self.title), title_align="left", border_style="blue")

    def _progress(self) -> Table:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        gone = _duration(time.perf_counter() - self._began)
        left = "" if self._line is None else f", {_duration(self._left)} left"
        row.add_row(
            Text(f"step {self._step:,}/{self._steps:,}", style="bold"),
            ProgressBar(total=max(self._steps, 1), completed=self._step),
            f"{gone} gone{left}",
        )
        return row


def _rows(line: dict[str, Any], losses: Sequence[float]) -> Iterator[tuple[str, str | Text]]:
    smoothed = f"smoothed {line['smoothed_loss']:.4f}"
    yield "loss", Text(f"{line['loss']:.4f}  {smoothed}  ").append(curve(losses), style="cyan")
    yield "rate", f"{line['learning_rate']:.2e}  gradient norm {line['grad_norm']:.3g}"
    yield (
        "speed",
        f"{line['samples_per_second']:,.1f} samples/s  {line['tokens_per_second']:,.0f} tokens/s  "
        f"{line['images_per_second']:,.1f} images/s",
    )
    waiting = f"{line['data_wait_fraction']:.1%} of the time"
    # Above this the data side is what the run is slow by.
    yield (
        "waiting for data",
        Text(waiting, style="yellow" if line["data_wait_fraction"] > 0.05 else ""),
    )
    gpu = f"  GPU at most {size(line['gpu_bytes'])}" if "gpu_bytes" in line else ""
    yield "memory", f"process {size(line['process_bytes'])}{gpu}"
    left_out = f"  left out {line['left_out']:,}" if line["left_out"] else ""
    yield (
        "so far",
        f"{line['samples']:,} samples  {line['tokens']:,} tokens  {line['images']:,} images"
        + left_out,
    )


def _looked(look: Look, first: Look | None) -> str:
    before = "" if first is None or first is look else f", {first.loss:.4f} at step {first.step:,}"
    left_out = f", {look.left_out:,} left out" if look.left_out else ""
    return (
        f"loss {look.loss:.4f} at step {look.step:,}{before}  ({look.samples:,} samples{left_out})"
    )


def _shown(answer: Answer) -> Text:
    question, wanted, given = _texts(answer)
    text = Text(f"{question}  ", no_wrap=True, overflow="ellipsis")
    text.append(given or "(nothing)", style="green" if given == wanted else "yellow")
    return text if given == wanted else text.append(f"  wanted {wanted}")


def _texts(answer: Answer) -> tuple[str, str, str]:
    question = answer.question.replace(IMAGE_TOKEN, "")
    return _short(question), _short(answer.wanted), _short(answer.answer)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Values as a row of bars, each the mean of its part of them; logarithmic if none is 0."""
    count = min(len(values), width)
    edges = [len(values) * place // count for place in range(count + 1)] if count else [0]
    parts = [values[a:b] for a, b in pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    if all(mean > 0 for mean in means):  # or a steep start would leave the rest flat
        means = [math.log(mean) for mean in means]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def size(count: int) -> str:
    """Bytes as people read them: 1.2 GB."""
    unit = next(((n, u) for n, u in ((1e9, "GB"), (1e6, "MB")) if count >= n), (1e3, "kB"))
    return f"{count / unit[0]:.3g} {unit[1]}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _logging_above() -> Iterator[None]:
    """Log handlers that write to the terminal write through the live display, which is there by now
    as `sys.stderr`; else their lines would land in the middle of it."""
    terminal = (sys.__stdout__, sys.__stderr__)
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    moved = [
        (handler, handler.stream)
        for logger in (logging.root, *loggers)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in terminal
    ]
    for handler, _ in moved:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
