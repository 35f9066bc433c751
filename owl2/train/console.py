"""The progress of a run on the terminal: a live panel, or lines in a file or a pipe."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.train.metrics import Logger
from owl2.train.validation import Generation, ValidationResult

LINE_SECONDS = 5.0  # minimum between two lines
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
TEXT_WIDTH = 60
# Above this fraction of time without data the run is limited by data loading.
HIGH_DATA_WAIT = 0.05


class ConsoleLogger(Logger):
    """Prints a line at most every few seconds.

    `history`: The lines of ``log.jsonl`` of earlier sessions.
    """

    def __init__(
        self, console: Console, title: str = "", history: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.console, self.title = console, title
        self.losses = [line["loss"] for line in history]
        self.step = self.start = self.steps = 0
        self.began = time.perf_counter()
        self._last_line = -math.inf

    def begin(self, step: int, steps: int) -> None:
        """Start the clock."""
        self.step, self.start, self.steps = step, step, steps
        self.began = time.perf_counter()

    def log_step(self, step: int) -> None:
        """Update the progress."""
        self.step = step

    def remaining(self) -> str:
        """The estimated remaining time."""
        seconds = (time.perf_counter() - self.began) / max(self.step - self.start, 1)
        return _duration(seconds * (self.steps - self.step))

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Print a line, if the last one is old enough."""
        now, step = time.perf_counter(), metrics["step"]
        if now - self._last_line < LINE_SECONDS and step != self.steps:
            return
        self._last_line = now
        self._print(
            f"step {step:>6}/{self.steps}  loss {metrics['loss']:.4f} "
            f"(smoothed {metrics['smoothed_loss']:.4f})  lr {metrics['learning_rate']:.2e}  "
            f"{metrics['samples_per_second']:.1f} samples/s  {self.remaining()} left"
        )

    def log_validation(self, result: ValidationResult) -> None:
        """Print the loss and the generations."""
        skipped = f", {result.num_skipped} skipped" if result.num_skipped else ""
        self._print(
            f"step {result.step:>6}/{self.steps}  validation loss {result.loss:.4f} "
            f"({result.samples:,} samples{skipped}, {result.seconds:.1f} s)"
        )
        for generation in result.generations:
            prompt, reference, prediction = _texts(generation)
            self._print(f"  {prompt}  prediction {prediction!r}, reference {reference!r}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LivePanel(ConsoleLogger):
    """Draws a panel twice a second. Output of other code appears above it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._metrics: dict[str, Any] | None = None
        self._validations: list[ValidationResult] = []
        self._open = ExitStack()

    def begin(self, step: int, steps: int) -> None:
        """Open the panel."""
        super().begin(step, steps)
        live = Live(console=self.console, get_renderable=self.render, refresh_per_second=2)
        self._open.enter_context(live)
        # Log handlers for the terminal write through the live display, which has replaced
        # `sys.stderr`; else their lines would appear inside the panel.
        terminal = {sys.__stdout__, sys.__stderr__} - {sys.stderr}
        for name in (None, *list(logging.root.manager.loggerDict)):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in terminal:
                    self._open.callback(handler.setStream, handler.setStream(sys.stderr))

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Show the metrics from the next redraw on."""
        self.losses.append(metrics["loss"])
        self._metrics = metrics

    def log_validation(self, result: ValidationResult) -> None:
        """Show the validation from the next redraw on."""
        self._validations.append(result)

    def close(self) -> None:
        """Draw the panel a last time."""
        self._open.close()

    def render(self) -> RenderableType:
        """The current panel."""
        rows = Table.grid(Column(style="dim"), Column(ratio=1), padding=(0, 2))
        if self._metrics is not None:
            _add_metrics(rows, self._metrics, self.losses)
        if self._validations:
            _add_validation(rows, self._validations[0], self._validations[-1])
        columns = (Column(), Column(ratio=1), Column(justify="right"))
        progress = Table.grid(*columns, padding=(0, 2), expand=True)
        remaining = "" if self._metrics is None else f", {self.remaining()} left"
        progress.add_row(
            Text(f"step {self.step:,}/{self.steps:,}", style="bold"),
            ProgressBar(total=max(self.steps, 1), completed=self.step),
            f"{_duration(time.perf_counter() - self.began)} elapsed{remaining}",
        )
        content = Group(progress, rows)
        return Panel(content, title=Text(self.title), title_align="left", border_style="blue")


def _add_metrics(rows: Table, metrics: dict[str, Any], losses: Sequence[float]) -> None:
    loss = f"{metrics['loss']:.4f}  smoothed {metrics['smoothed_loss']:.4f}  "
    rows.add_row("loss", Text(loss).append(sparkline(losses), style="cyan"))
    rate, norm = metrics["learning_rate"], metrics["grad_norm"]
    rows.add_row("learning rate", f"{rate:.2e}  gradient norm {norm:.3g}")
    speeds = (("samples", ".1f"), ("tokens", ".0f"), ("images", ".1f"))
    speed = (f"{metrics[f'{name}_per_second']:,{digits}} {name}/s" for name, digits in speeds)
    rows.add_row("speed", "  ".join(speed))
    wait = metrics["data_wait_fraction"]
    style = "yellow" if wait > HIGH_DATA_WAIT else ""
    rows.add_row("data wait", Text(f"{wait:.1%} of the time", style))
    gpu = metrics.get("gpu_memory_bytes")
    peak = "" if gpu is None else f"  GPU peak {decimal(gpu)}"
    rows.add_row("memory", f"process {decimal(metrics['process_memory_bytes'])}{peak}")
    totals = [f"{metrics[name]:,} {name}" for name in ("samples", "tokens", "images")]
    if metrics["num_skipped"]:
        totals.append(f"{metrics['num_skipped']:,} skipped")
    rows.add_row("total", "  ".join(totals))


def _add_validation(rows: Table, first: ValidationResult, last: ValidationResult) -> None:
    before = "" if first is last else f", {first.loss:.4f} at step {first.step:,}"
    skipped = f", {last.num_skipped:,} skipped" if last.num_skipped else ""
    samples = f"{last.samples:,} samples{skipped}"
    rows.add_row("validation", f"loss {last.loss:.4f} at step {last.step:,}{before}  ({samples})")
    for generation in last.generations:
        prompt, reference, prediction = _texts(generation)
        correct = prediction == reference
        text = Text(f"{prompt}  ", no_wrap=True, overflow="ellipsis")
        text.append(prediction or "(empty)", style="green" if correct else "yellow")
        rows.add_row("", text if correct else text.append(f"  reference {reference}"))


def _texts(generation: Generation) -> list[str]:
    """Prompt, reference and prediction, each on one line of limited width."""
    texts = (
        generation.prompt.replace(IMAGE_TOKEN, ""),
        generation.reference,
        generation.prediction,
    )
    lines = (" ".join(text.split()) for text in texts)
    return [x if len(x) <= TEXT_WIDTH else f"{x[: TEXT_WIDTH - 1]}…" for x in lines]


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Values as a row of bars, each the mean of a part of them; logarithmic if all are positive."""
    if not values:
        return ""
    parts = np.array_split(np.array(values), min(len(values), width))
    means = np.array([part.mean() for part in parts])
    if (means > 0).all():  # a linear scale would show a steep start only
        means = np.log(means)
    heights = (means - means.min()) / (np.ptp(means) or 1.0) * (len(BARS) - 1)
    return "".join(BARS[height] for height in heights.round().astype(int))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
