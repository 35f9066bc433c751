"""The progress of a run on the terminal: a live panel, or lines in a file or a pipe."""

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
from transformers import TrainerControl, TrainerState, TrainingArguments

from owl2.processing.chat_template import IMAGE_TOKEN
from owl2.train.metrics import Logger
from owl2.train.validation import Generation, ValidationResult

LINE_SECONDS = 5.0  # minimum between two lines
REDRAWS_PER_SECOND = 2
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
TEXT_WIDTH = 60
# Above this fraction of time without data the run is limited by data loading.
HIGH_DATA_WAIT = 0.05


class ConsoleLogger(Logger):
    """Prints a line at most every few seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.step = self.start = self.steps = 0
        self.began = time.perf_counter()
        self._last_line: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = self.start = state.global_step
        self.steps = state.max_steps
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step

    def remaining(self) -> str:
        """The estimated remaining time."""
        seconds = (time.perf_counter() - self.began) / max(self.step - self.start, 1)
        return _duration(seconds * (self.steps - self.step))

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Print a line, if the last one is old enough."""
        now, last, step = time.perf_counter(), self._last_line, metrics["step"]
        if last is not None and now - last < LINE_SECONDS and step != self.steps:
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
    """Draws a panel twice a second. Output of other code appears above it.

    `history`: The lines of ``log.jsonl`` of earlier sessions.
    """

    def __init__(
        self, console: Console, title: str, history: Sequence[dict[str, Any]] = ()
    ) -> None:
        super().__init__(console)
        self.title = title
        self._losses = [line["loss"] for line in history]
        self._metrics: dict[str, Any] | None = None
        self._validations: list[ValidationResult] = []
        self._open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=REDRAWS_PER_SECOND,
        )
        self._open.enter_context(live)
        self._open.enter_context(_redirect_logging())

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Show the metrics from the next redraw on."""
        self._losses.append(metrics["loss"])
        self._metrics = metrics

    def log_validation(self, result: ValidationResult) -> None:
        """Show the validation from the next redraw on."""
        self._validations.append(result)

    def close(self) -> None:
        """Draw the panel a last time."""
        self._open.close()

    def render(self) -> RenderableType:
        """The current panel."""
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column(ratio=1)
        if self._metrics is not None:
            for name, value in _metric_rows(self._metrics, self._losses):
                rows.add_row(name, value)
        if self._validations:
            for name, value in _validation_rows(self._validations[0], self._validations[-1]):
                rows.add_row(name, value)
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column()
        progress.add_column(ratio=1)
        progress.add_column(justify="right")
        remaining = "" if self._metrics is None else f", {self.remaining()} left"
        progress.add_row(
            Text(f"step {self.step:,}/{self.steps:,}", style="bold"),
            ProgressBar(total=max(self.steps, 1), completed=self.step),
            f"{_duration(time.perf_counter() - self.began)} elapsed{remaining}",
        )
        content = Group(progress, rows)
        return Panel(content, title=Text(self.title), title_align="left", border_style="blue")


def _metric_rows(
    metrics: dict[str, Any], losses: Sequence[float]
) -> Iterator[tuple[str, str | Text]]:
    loss = f"{metrics['loss']:.4f}  smoothed {metrics['smoothed_loss']:.4f}  "
    yield "loss", Text(loss).append(sparkline(losses), style="cyan")
    yield (
        "learning rate",
        f"{metrics['learning_rate']:.2e}  gradient norm {metrics['grad_norm']:.3g}",
    )
    yield (
        "speed",
        f"{metrics['samples_per_second']:,.1f} samples/s  "
        f"{metrics['tokens_per_second']:,.0f} tokens/s  "
        f"{metrics['images_per_second']:,.1f} images/s",
    )
    wait = metrics["data_wait_fraction"]
    yield "data wait", Text(f"{wait:.1%} of the time", "yellow" if wait > HIGH_DATA_WAIT else "")
    gpu = metrics.get("gpu_memory_bytes")
    peak = "" if gpu is None else f"  GPU peak {format_bytes(gpu)}"
    yield "memory", f"process {format_bytes(metrics['process_memory_bytes'])}{peak}"
    skipped = f"  {metrics['num_skipped']:,} skipped" if metrics["num_skipped"] else ""
    yield (
        "total",
        f"{metrics['samples']:,} samples  {metrics['tokens']:,} tokens  "
        f"{metrics['images']:,} images{skipped}",
    )


def _validation_rows(
    first: ValidationResult, last: ValidationResult
) -> Iterator[tuple[str, str | Text]]:
    before = "" if first is last else f", {first.loss:.4f} at step {first.step:,}"
    skipped = f", {last.num_skipped:,} skipped" if last.num_skipped else ""
    yield (
        "validation",
        f"loss {last.loss:.4f} at step {last.step:,}{before}  ({last.samples:,} samples{skipped})",
    )
    for generation in last.generations:
        prompt, reference, prediction = _texts(generation)
        correct = prediction == reference
        text = Text(f"{prompt}  ", no_wrap=True, overflow="ellipsis")
        text.append(prediction or "(empty)", style="green" if correct else "yellow")
        yield "", text if correct else text.append(f"  reference {reference}")


def _texts(generation: Generation) -> tuple[str, str, str]:
    """Prompt, reference and prediction, each on one line of limited width."""
    texts = (
        " ".join(text.split())
        for text in (
            generation.prompt.replace(IMAGE_TOKEN, ""),
            generation.reference,
            generation.prediction,
        )
    )
    prompt, reference, prediction = (
        text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…" for text in texts
    )
    return prompt, reference, prediction


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Values as a row of bars, each the mean of a part of them; logarithmic if all are positive."""
    count = min(len(values), width)
    edges = [len(values) * i // count for i in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if all(mean > 0 for mean in means):  # a linear scale would show a steep start only
        means = [math.log(mean) for mean in means]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def format_bytes(count: int) -> str:
    """Bytes with a decimal unit, such as 1.2 GB."""
    factor, unit = next(((f, u) for f, u in ((1e9, "GB"), (1e6, "MB")) if count >= f), (1e3, "kB"))
    return f"{count / factor:.3g} {unit}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _redirect_logging() -> Iterator[None]:
    """Let log handlers for the terminal write through the live display, which has replaced
    `sys.stderr`; else their lines would appear inside the panel."""
    terminal = (sys.__stdout__, sys.__stderr__)
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    redirected = [
        (handler, handler.stream)
        for logger in (logging.root, *loggers)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in terminal
    ]
    for handler, _ in redirected:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in redirected:
            handler.setStream(stream)
