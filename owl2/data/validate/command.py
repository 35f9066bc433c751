"""`owl2 data check`: validates all samples before training, and describes the dataset.

::

    datasets ──validate_all──► invalid samples ──► OUTPUT/invalid_samples.jsonl
                          └──► DatasetStats ─────► OUTPUT/statistics.json, statistics.png, tables
"""

import json
import os
import signal
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console
from rich.text import Text

from owl2.checkpoints.config_file import CONFIG_FILE, find_file, read_config
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample
from owl2.data.validate.statistics import (
    DatasetStats,
    batch_padding,
    dataset_table,
    plot_statistics,
    spread_table,
)
from owl2.data.validate.validator import (
    SampleValidator,
    ValidationConfig,
    WorkResult,
    mp_context,
    validate_all,
    work_items,
)
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_file, atomic_write_text, require_checkpoint
from owl2.processing.processor import Owl2Processor
from owl2.progress import ProgressReporter

MAX_SHOWN = 20
# 8 bytes each. Duplicates are not counted in larger datasets.
MAX_HASHES = 20_000_000
INVALID_FILE, STATISTICS_FILE, PLOT_FILE = (
    "invalid_samples.jsonl",
    "statistics.json",
    "statistics.png",
)


@dataclass
class ValidationReport:
    """The result of a validation.

    Attributes:
        stats: By the name of the dataset.
        first: The first `MAX_SHOWN` invalid samples.
        finished: False after Ctrl-C; the report then covers the samples so far.
    """

    stats: dict[str, DatasetStats]
    first: list[InvalidSample] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = True
    _hashes: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def total(self) -> DatasetStats:
        """The statistics of all datasets together."""
        total = DatasetStats()
        for stats in self.stats.values():
            total.merge(stats)
        return total

    @property
    def duplicates(self) -> int | None:
        """Samples whose texts and images occurred before; None for too many samples."""
        if len(self._hashes) > MAX_HASHES:
            return None
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.uint64)))

    def add(self, name: str, result: WorkResult) -> None:
        """Adds the result of a work item of the dataset `name`."""
        self.stats[name].merge(result.stats)
        self.first += result.invalid[: MAX_SHOWN - len(self.first)]
        if len(self._hashes) <= MAX_HASHES:
            self._hashes.extend(result.hashes)


def effective_max_length(model: str, max_length: int | None) -> int | None:
    """`max_length`, or the context of the model; None if its config.json does not have it.

    Raises:
        InputError: `model` has no processor, its config.json is not valid, or `max_length` exceeds
            the context.
    """
    require_checkpoint(model, "a processor")
    if find_file(model, CONFIG_FILE, {}) is None:
        return max_length
    context = read_config(model).max_position_embeddings
    if max_length is not None and max_length > context:
        raise InputError(
            f"max_length ({max_length}) exceeds the {context} positions of {model}",
            ErrorCode.TOO_LONG,
        )
    return context if max_length is None else max_length


def unique_names(datasets: Iterable[tuple[str, SampleDataset]]) -> dict[str, SampleDataset]:
    """Datasets by name; the second with the same name becomes "NAME (2)"."""
    result: dict[str, SampleDataset] = {}
    for name, samples in datasets:
        count = sum(other == name or other.startswith(f"{name} (") for other in result)
        result[f"{name} ({count + 1})" if count else name] = samples
    return result


def validate_datasets(
    datasets: Mapping[str, SampleDataset],
    processor: Owl2Processor,
    config: ValidationConfig,
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
    validator = SampleValidator(processor, config)
    report = _validate(datasets, validator, num_workers, output, console)
    total = report.total
    padding = batch_padding(total.tokens, config.max_length, batch_size)
    _print_report(console, report, total, config, padding)
    if output is not None:
        summary = {
            "complete": report.finished,
            "max_length": config.max_length,
            "images_checked": config.check_images,
            "seconds": report.seconds,
            "num_workers": num_workers,
            "duplicates": report.duplicates,
            "padding": padding,
            "all": total.summary(),
            "datasets": {name: stats.summary() for name, stats in report.stats.items()},
        }
        atomic_write_text(output / STATISTICS_FILE, json.dumps(summary, indent=2) + "\n")
        title = f"{total.usable:,} samples of {', '.join(datasets)}"
        if not plot_statistics(output / PLOT_FILE, total, title, config.max_length):
            hint = f"No {PLOT_FILE}: matplotlib is not installed (pip install 'owl2-vlm[plot]')"
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
    names, samples = list(datasets), list(datasets.values())
    stop = mp_context().Event()
    start = time.perf_counter()
    total = len(work_items(samples))
    with (
        open(os.devnull, "w") if output is None else atomic_file(output / INVALID_FILE) as file,
        validate_all(samples, validator, num_workers, stop) as results,
        stop_on_interrupt(stop),
        ProgressReporter(console, "checking", total, unit="work items", transient=True) as progress,
    ):
        rows = invalid = 0
        for result in results:
            name = names[result.item.dataset]
            report.add(name, result)
            for sample in result.invalid:
                line = {
                    "dataset": name,
                    "source": sample.source,
                    "code": sample.code,
                    "reason": sample.reason,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            rows, invalid = rows + result.stats.rows, invalid + len(result.invalid)
            rate = rows / (time.perf_counter() - start)
            progress.advance(1, f"{rows:,} rows, {invalid:,} invalid, {rate:,.0f} rows/s")
    report.finished = not stop.is_set()
    report.seconds = time.perf_counter() - start
    return report


@contextmanager
def stop_on_interrupt(stop: Event) -> Iterator[None]:
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
    total: DatasetStats,
    config: ValidationConfig,
    padding: Mapping[str, float],
) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    console.print(dataset_table(report.stats))
    if total.usable:
        console.print(spread_table(total))
        line(
            f"Padding in batches of {padding['batch_size']} samples: {padding['padded']:.0%}; "
            f"with packing: {padding['packed']:.0%}."
        )
    if total.truncated:
        share = total.truncated / total.usable
        line(
            f"{total.truncated:,} samples ({share:.1%}) are truncated to {config.max_length:,} "
            "tokens.",
            "yellow",
        )
    if total.unchecked_images:
        hint = "; --fetch-urls opens images behind URLs" if config.check_images else ""
        line(f"{total.unchecked_images:,} images were not opened{hint}.", "yellow")
    if report.duplicates:
        line(f"{report.duplicates:,} samples are duplicates of others.", "yellow")
    for code, count in sorted(total.invalid.items()):
        line(f"{count:>8,}  {code}", "red")
    for sample in report.first:
        line(f"{sample.source}: {sample.reason}")
    invalid = total.invalid.total()
    if invalid > len(report.first):
        line(
            f"... and {invalid - len(report.first):,} more; --output writes all of them to "
            f"{INVALID_FILE}."
        )
    rate = total.rows / max(report.seconds, 1e-9)
    line(
        f"{'Checked' if report.finished else 'Stopped after'} {total.rows:,} rows in "
        f"{report.seconds:,.1f} s ({rate:,.0f} rows/s).",
        "" if report.finished else "yellow",
    )
    if invalid:
        line(
            f"{invalid:,} samples are invalid: training stops at them, or skips them with "
            "on_invalid_sample: skip.",
            "red",
        )
    elif report.finished:
        line("No sample is invalid.", "green")
