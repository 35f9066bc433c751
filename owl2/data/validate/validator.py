"""Looking at every sample as training will take it, in several processes.

::

    sources ──cut into units──► workers: each sample opened, tokenised, judged ──► Result a unit

A unit is some rows of a source that has places, or a shard of one that streams. A sample is judged
by the very function that training makes its features with; only the last step, from an image to
the model's pixels, is left out.
"""

import hashlib
import json
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import torch
from PIL import Image

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import require_labels
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample, Message, Sample, get_or_invalid
from owl2.data.validate.statistics import Seen, Tally
from owl2.data.webdataset import TarDataset
from owl2.errors import InputError
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor

ROWS_A_UNIT = 100
UNITS_AHEAD = 4  # for each worker: enough that none waits, few enough that memory stays flat


@dataclass(frozen=True)
class Rules:
    """What is asked of a sample. `max_length`: tokens, None: any number. `open_images`: decode
    them; `fetch`: those behind a URL, too."""

    max_length: int | None = None
    open_images: bool = True
    fetch: bool = False


@dataclass(frozen=True)
class Unit:
    """A piece of work: rows `start` to `stop` of source number `source`, or its shard `start`."""

    source: int
    start: int
    stop: int


@dataclass
class Result:
    """What came of a unit: its bad rows in order, counts, and a mark for each usable sample's
    words and images (64 bits: the same for the same)."""

    unit: Unit
    bad: list[InvalidSample] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    marks: list[int] = field(default_factory=list)


# ------------------------------------------------------------------ one sample


class Looker(Owl2ImageProcessor):
    """Opens images as training does, and notes their sizes instead of making pixels of them."""

    def __init__(self, like: Owl2ImageProcessor, rules: Rules) -> None:
        super().__init__(1, like.policy, max_pixels=like.max_pixels)
        self._rules = rules
        self.sizes: list[tuple[int, int]] = []
        self.unopened = 0

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Any]:
        wanted = [source for source in images if self._is_opened(source)]
        self.unopened += len(images) - len(wanted)
        return super().__call__(wanted, return_tensors)

    def _is_opened(self, source: Any) -> bool:
        is_url = isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))
        return self._rules.open_images and (self._rules.fetch or not is_url)

    def _fill(self, image: Image.Image, pixels: np.ndarray) -> None:
        self.sizes.append(image.size)


class Judge:
    """Says of a sample what is wrong with it, or how large it is.

    Takes the `processor` over: it makes no pixels any more.
    """

    def __init__(self, processor: Owl2Processor, rules: Rules) -> None:
        self._processor = processor
        self._rules = rules
        self._like = processor.image_processor

    def look(self, sample: Sample | InvalidSample) -> Seen | InvalidSample:
        """What was seen of it, or why training would not take it."""
        if isinstance(sample, InvalidSample):
            return sample
        looker = self._processor.image_processor = Looker(self._like, self._rules)
        max_length = self._rules.max_length
        try:
            features = dict(self._processor.for_training(sample.messages, max_length))
            require_labels(features, max_length)
        except InputError as error:
            return InvalidSample.from_error(sample.source, error)
        tokens = features["input_ids"].shape[-1]
        if tokens == max_length:  # just so long, or cut
            tokens = self._processor.count_tokens(sample.messages)
        return Seen(
            turns=len(sample.messages),
            images=len(looker.sizes) + looker.unopened,
            tokens=tokens,
            learned=int((features["labels"] != IGNORE_INDEX).sum()),
            is_cut=max_length is not None and tokens > max_length,
            sizes=tuple(looker.sizes),
            unopened=looker.unopened,
        )


def mark_of(messages: Sequence[Message]) -> int:
    """64 bits of a hash of the words and the images (their paths, or bytes that are there)."""
    text = json.dumps(messages, sort_keys=True, default=_named)
    return int.from_bytes(_digest(text.encode()), "little")


def _named(value: Any) -> str:
    data = value.tobytes() if isinstance(value, Image.Image) else value
    return _digest(data).hex() if isinstance(data, bytes) else str(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


# ------------------------------------------------------------------ many


def count_units(sources: Sequence[SampleDataset]) -> int:
    """How many units all the work has."""
    return sum(1 for _ in units_of(sources))


def units_of(sources: Sequence[SampleDataset]) -> Iterator[Unit]:
    """All the work, in the order of the data."""
    for number, samples in enumerate(sources):
        if isinstance(samples, TarDataset):
            size, step = len(samples.urls), 1
        else:
            size, step = len(samples), ROWS_A_UNIT
        for start in range(0, size, step):
            yield Unit(number, start, min(start + step, size))


class Desk:
    """Where units are worked on: the sources, the judge, and the word to stop."""

    def __init__(self, sources: Sequence[SampleDataset], judge: Judge, stop: Event) -> None:
        self.sources = sources
        self.judge = judge
        self.stop = stop

    def work(self, unit: Unit) -> Result:
        """Look at all of a unit; at less of it once the word to stop has come."""
        result = Result(unit)
        for sample in self._samples(unit):
            if self.stop.is_set():
                break
            seen = self.judge.look(sample)
            if isinstance(seen, InvalidSample):
                result.bad.append(seen)
                result.tally.bad[seen.code] += 1
            elif isinstance(sample, Sample):
                result.tally.add(seen)
                result.marks.append(mark_of(sample.messages))
        return result

    def _samples(self, unit: Unit) -> Iterator[Sample | InvalidSample]:
        samples = self.sources[unit.source]
        if not isinstance(samples, TarDataset):
            yield from (get_or_invalid(samples, place) for place in range(unit.start, unit.stop))
            return
        url = samples.urls[unit.start]
        try:
            yield from TarDataset([url])
        except InputError as error:  # the shard as a whole: gone, or no tar
            yield InvalidSample.from_error(url, error)


@contextmanager
def look_at_all(
    sources: Sequence[SampleDataset], judge: Judge, workers: int, stop: Event
) -> Iterator[Iterator[Result]]:
    """Results of all units, in their order whatever the number of workers.

    The workers begin on entering: before anyone starts a thread, for a copy of a process gets the
    locks that others hold, but not who would release them. Once `stop` is set, units that have been
    begun are cut short, and no more are begun.

    Raises:
        InputError: a worker was ended from outside, as the system does when memory is short.
    """
    desk = Desk(sources, judge, stop)
    units = units_of(sources)
    workers = min(workers, count_units(sources))
    if workers <= 1:
        yield (desk.work(unit) for unit in units if not stop.is_set())
        return
    with ProcessPoolExecutor(workers, context(), _sit_down, (desk,)) as pool:
        begun = deque(pool.submit(_work, unit) for unit in islice(units, workers * UNITS_AHEAD))
        try:
            yield _in_order(pool, begun, units, stop)
        except BrokenProcessPool as error:
            raise InputError(
                "A process of the check was ended from outside. If memory was short, take fewer "
                "--workers."
            ) from error
        except BaseException:
            stop.set()  # else the pool would wait for all that has been handed in
            raise


def _in_order(
    pool: ProcessPoolExecutor, begun: deque[Future[Result]], units: Iterator[Unit], stop: Event
) -> Iterator[Result]:
    while begun:
        yield begun.popleft().result()
        if not stop.is_set():
            begun.extend(pool.submit(_work, unit) for unit in islice(units, 1))


def context() -> BaseContext:
    """How processes begin: as copies where that is safe, for importing torch takes seconds."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


_desk: Desk | None = None  # a worker's own


def _sit_down(desk: Desk) -> None:
    global _desk
    _desk = desk
    torch.set_num_threads(1)  # the workers are what runs in parallel
    # Ctrl-C goes to all processes of a terminal; the first one says what is to be done about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(unit: Unit) -> Result:
    assert _desk is not None  # `_sit_down` was here
    return _desk.work(unit)
