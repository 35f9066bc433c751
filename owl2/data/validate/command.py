"""`owl2 data check`: validates all samples before training, and describes the dataset.

::

    datasets ──validate_all──► invalid samples ──► OUTPUT/invalid_samples.jsonl
                          └──► DatasetStats ─────► OUTPUT/statistics.json, statistics.png, tables
"""

import json
import os
import signal
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console
from rich.text import Text

from owl2.checkpoints.config_file import CONFIG_FILE, find_file, read_config, resolve_checkpoint
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample
from owl2.data.validate.statistics import (
    DatasetStats,
    batch_padding,
    dataset_table,
    plot_statistics,
    spread_table,
)
from owl2.data.validate.validator import SampleValidator, WorkItems, WorkResult
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_json
from owl2.progress import ProgressReporter

MAX_SHOWN = 20
# 8 bytes each. Duplicates are not counted in larger datasets.
MAX_HASHES = 20_000_000
INVALID_FILE = "invalid_samples.jsonl"


@dataclass
class ValidationReport:
    """The result of a validation.

    Attributes:
        stats: By the name of the dataset.
        total: The statistics of all datasets together.
        first: The first `MAX_SHOWN` invalid samples.
        finished: False after Ctrl-C; the report then covers the samples so far.
    """

    stats: dict[str, DatasetStats]
    total: DatasetStats = field(default_factory=DatasetStats)
    first: list[InvalidSample] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = True
    _hashes: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def duplicates(self) -> int | None:
        """Samples whose texts and images occurred before; None for too many samples."""
        if len(self._hashes) > MAX_HASHES:
            return None
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.uint64)))

    def add(self, result: WorkResult) -> None:
        """Adds the result of a work item."""
        self.stats[result.dataset].merge(result.stats)
        self.total.merge(result.stats)
        self.first += result.invalid[: MAX_SHOWN - len(self.first)]
        if len(self._hashes) <= MAX_HASHES:
            self._hashes.extend(result.hashes)


def effective_max_length(model: str, max_length: int | None) -> int | None:
    """`max_length`, or the context of the model; None if its config.json does not have it.

    Raises:
        InputError: `model` has no processor, its config.json is not valid, or `max_length` exceeds
            the context.
    """
    model = resolve_checkpoint(model, "a processor", weights=False)
    if find_file(model, CONFIG_FILE, {}) is None:
        return max_length
    context = read_config(model).max_position_embeddings
    if max_length is not None and max_length > context:
        raise InputError(
            f"max_length ({max_length}) exceeds the {context} positions of {model}",
            ErrorCode.TOO_LONG,
        )
    return context if max_length is None else max_length


def validate_datasets(
    datasets: Mapping[str, SampleDataset],
    validator: SampleValidator,
    *,
    num_workers: int,
    batch_size: int = 8,
    output: str | Path | None = None,
    console: Console | None = None,
) -> ValidationReport:
    """Validates all samples and prints a report. Ctrl-C ends it with the results so far.

    Args:
        num_workers: Processes. The report does not depend on it.
        batch_size: For the share of padding.
        output: Directory for the list of invalid samples and the statistics.

    Raises:
        InputError: `output` cannot be written, a worker was killed, or, after the report, a dataset
            has no samples.
    """
    console = console or Console()
    output = None if output is None else Path(output)
    report = _validate(datasets, validator, num_workers, output, console)
    total = report.total
    padding = batch_padding(total.tokens, validator.max_length, batch_size)
    _print_report(console, report, validator, padding)
    if output is not None:
        summary = {
            "complete": report.finished,
            "max_length": validator.max_length,
            "images_checked": validator.check_images,
            "seconds": report.seconds,
            "num_workers": num_workers,
            "duplicates": report.duplicates,
            "padding": padding,
            "all": total.summary(),
            "datasets": {name: stats.summary() for name, stats in report.stats.items()},
        }
        atomic_write_json(output / "statistics.json", summary)
        title = f"{total.usable:,} samples of {', '.join(datasets)}"
        plot = output / "statistics.png"
        if not plot_statistics(plot, total, title, validator.max_length):
            hint = f"No {plot.name}: matplotlib is not installed (pip install 'owl2-vlm[plot]')"
            console.print(hint, markup=False)
        console.print(f"Wrote {INVALID_FILE} and the statistics to {output}", markup=False)
    empty = [name for name, stats in report.stats.items() if not stats.rows]
    if report.finished and empty:
        raise InputError(f"{', '.join(empty)}: no samples", ErrorCode.EMPTY_DATASET)
    return report


def _validate(
    datasets: Mapping[str, SampleDataset],
    validator: SampleValidator,
    num_workers: int,
    output: Path | None,
    console: Console,
) -> ValidationReport:
    report = ValidationReport({name: DatasetStats() for name in datasets})
    total, items = report.total, WorkItems(datasets, validator, num_workers)
    start = time.perf_counter()
    with (
        open(os.devnull, "w") if output is None else atomic_file(output / INVALID_FILE) as file,
        items.results() as results,
        stop_on_interrupt(items.stop),
        ProgressReporter(
            console, "checking", len(items), unit="work items", transient=True
        ) as progress,
    ):
        for result in results:
            report.add(result)
            for sample in result.invalid:
                line = {
                    "dataset": result.dataset,
                    "source": sample.source,
                    "code": sample.code,
                    "reason": sample.reason,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            rate = total.rows / (time.perf_counter() - start)
            invalid = total.invalid.total()
            progress.advance(1, f"{total.rows:,} rows, {invalid:,} invalid, {rate:,.0f} rows/s")
            if items.stop.is_set() and not result.stats.rows:
                break
    report.finished = not items.stop.is_set()
    report.seconds = time.perf_counter() - start
    return report


@contextmanager
def stop_on_interrupt(stop: Event | threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; the second raises `KeyboardInterrupt`."""

    def set_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, set_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _print_report(
    console: Console,
    report: ValidationReport,
    validator: SampleValidator,
    padding: Mapping[str, float],
) -> None:
    total = report.total
    invalid = total.invalid.total()
    console.print(dataset_table(report.stats))
    lines: list[tuple[str, str]] = []  # with a style
    if total.usable:
        console.print(spread_table(total))
        text = (
            f"Padding in batches of {padding['batch_size']} samples: {padding['padded']:.0%}; "
            f"with packing: {padding['packed']:.0%}."
        )
        lines.append((text, ""))
    if total.truncated:
        share = total.truncated / total.usable
        text = f"{total.truncated:,} samples ({share:.1%}) are truncated to "
        lines.append((f"{text}{validator.max_length:,} tokens.", "yellow"))
    if total.unchecked_images:
        hint = "; --fetch-urls opens images behind URLs" if validator.check_images else ""
        lines.append((f"{total.unchecked_images:,} images were not opened{hint}.", "yellow"))
    if total.unused_keys:
        keys = (f"{key} ({count:,})" for key, count in total.unused_keys.most_common(MAX_SHOWN))
        lines.append((f"Keys of rows that are not read: {', '.join(keys)}.", ""))
    if report.duplicates:
        lines.append((f"{report.duplicates:,} samples are duplicates of others.", "yellow"))
    lines += [(f"{count:>8,}  {code}", "red") for code, count in sorted(total.invalid.items())]
    lines += [(f"{sample.source}: {sample.reason}", "") for sample in report.first]
    if invalid > len(report.first):
        more = f"... and {invalid - len(report.first):,} more"
        lines.append((f"{more}; --output writes all of them to {INVALID_FILE}.", ""))
    rate = total.rows / max(report.seconds, 1e-9)
    verb, style = ("Checked", "") if report.finished else ("Stopped after", "yellow")
    rows = f"{total.rows:,} rows in {report.seconds:,.1f} s ({rate:,.0f} rows/s)"
    lines.append((f"{verb} {rows}.", style))
    if invalid:
        text = f"{invalid:,} samples are invalid: training stops at them, or skips them with "
        lines.append((f"{text}on_invalid_sample: skip.", "red"))
    elif report.finished:
        lines.append(("No sample is invalid.", "green"))
    for text, style in lines:
        console.print(Text(text, style), soft_wrap=True)
