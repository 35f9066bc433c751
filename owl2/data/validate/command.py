"""`owl2 data check`: is all of the data fit for training, and what is it like?

::

    sources ──looking──► bad rows ──► OUTPUT/bad_rows.jsonl, the first ones on the terminal
                     └─► Tally ─────► OUTPUT/statistics.json, statistics.png, tables
"""

import json
import os
import signal
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample
from owl2.data.validate.statistics import (
    Tally,
    batches,
    plot_statistics,
    sources_table,
    spread_table,
)
from owl2.data.validate.validator import Judge, Result, Rules, context, count_units, look_at_all
from owl2.errors import InputError
from owl2.files import atomic_file, atomic_write_text
from owl2.processing import pretrained_files as saved
from owl2.processing.processor import Owl2Processor

SHOWN = 20
# 8 bytes each: 160 MB. Beyond that, doubles are not looked for.
MARKS_KEPT = 20_000_000
PLAIN_SECONDS = 10.0
BAD_ROWS, STATISTICS, PLOT = "bad_rows.jsonl", "statistics.json", "statistics.png"


@dataclass
class Findings:
    """What a check has found. `tallies` by source; `first`: the first bad rows, with their source.

    `finished` is False after Ctrl-C: then it is what was found so far.
    """

    tallies: dict[str, Tally]
    first: list[tuple[str, InvalidSample]] = field(default_factory=list)
    marks: "array[int]" = field(default_factory=lambda: array("Q"))
    seconds: float = 0.0
    finished: bool = True

    @property
    def all(self) -> Tally:
        """Over all sources."""
        whole = Tally()
        for tally in self.tallies.values():
            whole.merge(tally)
        return whole

    @property
    def duplicates(self) -> int | None:
        """How many samples have been there before, words and images; None: too many to know."""
        if len(self.marks) > MARKS_KEPT:
            return None
        return len(self.marks) - len(np.unique(np.frombuffer(self.marks, np.uint64)))

    def add(self, name: str, result: Result) -> None:
        """Count what came of a unit of the source of this name."""
        self.tallies[name].merge(result.tally)
        self.first += [(name, bad) for bad in result.bad[: SHOWN - len(self.first)]]
        if len(self.marks) <= MARKS_KEPT:
            self.marks.extend(result.marks)


def limit_of(model: str, max_length: int | None) -> int | None:
    """How many tokens a sample may have: `max_length`, or all that the checkpoint's model takes.

    None: any number, as the checkpoint does not say.

    Raises:
        InputError: no processor there, a config.json that cannot be read, or the model takes less
            than `max_length`.
    """
    config = saved.read_json(saved.find_files(model, {})[saved.CONFIG_FILE])
    key = "max_position_embeddings"
    if config.get(key) is None:
        return max_length
    context = saved.number(config, key, 1)
    if max_length is not None and max_length > context:
        raise InputError(
            f"max_length ({max_length}) is more than the {context} positions of {model}: set it to "
            f"at most {context}"
        )
    return context if max_length is None else max_length


def named(sources: Iterable[tuple[str, SampleDataset]]) -> dict[str, SampleDataset]:
    """Sources by name; the second of a name is called "NAME (2)"."""
    by_name: dict[str, SampleDataset] = {}
    for name, samples in sources:
        others = sum(other == name or other.startswith(f"{name} (") for other in by_name)
        by_name[f"{name} ({others + 1})" if others else name] = samples
    return by_name


def check(
    sources: Mapping[str, SampleDataset],
    processor: Owl2Processor,
    rules: Rules,
    *,
    workers: int,
    batch_size: int = 8,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Findings:
    """Look at all samples of all sources; say what is wrong and what they are like.

    `batch_size`: for the share of padding. `output`: a directory for the complete list of bad rows
    and the statistics. Ctrl-C ends it with what was found so far. Apart from the time it took, the
    number of `workers` (processes) changes nothing. The `processor` is of no other use afterwards.

    Raises:
        InputError: `output` cannot be written, a worker was ended from outside, or, after all
            has been said, a source has no sample.
    """
    console = console or Console()
    output = None if output is None else Path(output)
    findings = _look(sources, Judge(processor, rules), workers, output, console)
    tally = findings.all
    padding = batches(tally.tokens, rules.max_length, batch_size)
    _say(console, findings, tally, rules, padding)
    if output is not None:
        facts = {
            "complete": findings.finished,
            "max_length": rules.max_length,
            "images_opened": rules.open_images,
            "seconds": findings.seconds,
            "workers": workers,
            "duplicates": findings.duplicates,
            "batches": padding,
            "all": tally.summary(),
            "sources": {name: part.summary() for name, part in findings.tallies.items()},
        }
        atomic_write_text(output / STATISTICS, json.dumps(facts, indent=2) + "\n")
        title = f"{tally.usable:,} samples of {', '.join(sources)}"
        if not plot_statistics(output / PLOT, tally, title, rules.max_length):
            hint = f"No {PLOT}: matplotlib is missing (pip install 'owl2-vlm[plot]')"
            console.print(hint, markup=False)
        console.print(f"{BAD_ROWS} and the statistics are in {output}", markup=False)
    if findings.finished and (
        empty := [n for n, part in findings.tallies.items() if not part.rows]
    ):
        raise InputError(f"{', '.join(empty)}: there is no sample in it")
    return findings


# ------------------------------------------------------------------ looking


def _look(
    sources: Mapping[str, SampleDataset],
    judge: Judge,
    workers: int,
    output: Path | None,
    console: Console,
) -> Findings:
    findings = Findings({name: Tally() for name in sources})
    names, samples = list(sources), list(sources.values())
    stop = context().Event()
    began = time.perf_counter()
    with (
        _list_of_bad(output) as file,
        look_at_all(samples, judge, workers, stop) as results,
        _stopped_by_interrupt(stop),
        _Progress(console, count_units(samples)) as progress,
    ):
        for result in results:
            name = names[result.unit.source]
            findings.add(name, result)
            file.writelines(_as_line(name, bad) for bad in result.bad)
            progress.add(result.tally.rows, len(result.bad))
    findings.finished = not stop.is_set()
    findings.seconds = time.perf_counter() - began
    return findings


@contextmanager
def _list_of_bad(output: Path | None) -> Iterator[TextIO]:
    """The open file for bad rows: written as they are found, for there may be any number."""
    with open(os.devnull, "w") if output is None else atomic_file(output / BAD_ROWS) as file:
        yield file


def _as_line(name: str, bad: InvalidSample) -> str:
    row = {"data": name, "row": bad.source, "kind": bad.code, "reason": bad.reason}
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextmanager
def _stopped_by_interrupt(stop: Event) -> Iterator[None]:
    """The first Ctrl-C asks to stop, a second one stops at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """A bar with rate and time left on a terminal, elsewhere a line every few seconds."""

    def __init__(self, console: Console, units: int) -> None:
        self._console = console
        self._units = units
        self._done = self._rows = self._bad = 0
        self._began = self._last = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            columns = (TextColumn("checking"), BarColumn(), TaskProgressColumn())
            more = (TextColumn("{task.fields[state]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, *more, console=self._console, transient=True)
            self._bar.add_task("", total=self._units, state="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, rows: int, bad: int) -> None:
        """Another unit is done, with so many rows, so many of them bad."""
        self._done, self._rows, self._bad = self._done + 1, self._rows + rows, self._bad + bad
        now = time.perf_counter()
        rate = self._rows / (now - self._began)
        state = f"{self._rows:,} rows, {self._bad:,} bad, {rate:,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, state=state)
        elif now - self._last >= PLAIN_SECONDS:
            self._last = now
            left = timedelta(seconds=round((now - self._began) * (self._units / self._done - 1)))
            line = f"{self._done / self._units:4.0%}  {state}, {left} left"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------ saying


def _say(
    console: Console,
    findings: Findings,
    tally: Tally,
    rules: Rules,
    padding: Mapping[str, float],
) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    console.print(sources_table(findings.tallies))
    if tally.usable:
        console.print(spread_table(tally))
        say(
            f"Of batches of {padding['batch_size']} samples, {padding['padded']:.0%} is padding; "
            f"packed, {padding['packed']:.0%} is."
        )
    if tally.cut:
        share = tally.cut / tally.usable
        say(
            f"{tally.cut:,} samples ({share:.1%}) are cut to {rules.max_length:,} tokens.", "yellow"
        )
    if tally.unopened:
        why = "; --fetch looks at those behind URLs" if rules.open_images else ""
        say(f"{tally.unopened:,} images were not looked at{why}.", "yellow")
    if findings.duplicates:
        say(f"{findings.duplicates:,} samples are there more than once.", "yellow")
    for code, count in sorted(tally.bad.items()):
        say(f"{count:>8,}  {code}", "red")
    for _, bad in findings.first:
        say(f"{bad.source}: {bad.reason}")
    number = tally.bad.total()
    if number > len(findings.first):
        say(f"... and {number - len(findings.first):,} more; all are in {BAD_ROWS} of an --output.")
    rate = tally.rows / max(findings.seconds, 1e-9)
    looked = f"{tally.rows:,} rows in {findings.seconds:,.1f} s ({rate:,.0f} rows/s)"
    if not findings.finished:
        say(f"Stopped: these are the first {looked}.", "yellow")
    else:
        say(f"Looked at {looked}.")
    if number:
        say(
            f"{number:,} rows are bad: training refuses them, or skips them with on_invalid_sample: skip.",
            "red",
        )
    elif findings.finished:
        say("No row is bad.", "green")
