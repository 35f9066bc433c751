"""Validates every sample as training encodes it, in several processes.

::

    datasets ──split into work items──► workers: SampleValidator ──► WorkResult per item

A work item is some rows of a dataset, or one shard of a stream. A sample is encoded by the function
that training uses, without pixel values: the images are only opened.
"""

import hashlib
import json
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from typing import Any

import torch
from PIL import Image

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import require_labels
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample, Message, Sample, get_or_invalid
from owl2.data.validate.statistics import DatasetStats, SampleStats
from owl2.data.webdataset import TarDataset
from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image
from owl2.processing.processor import Owl2Processor

ROWS_PER_ITEM = 100
ITEMS_AHEAD = 4  # per worker: enough that no worker waits, few enough to bound the memory


@dataclass(frozen=True)
class ValidationConfig:
    """What is checked.

    Attributes:
        max_length: Samples are truncated to this many tokens; None for no limit.
        check_images: Open the images. Broken images are found in no other way.
        fetch_urls: Also open images behind http(s) URLs.
    """

    max_length: int | None = None
    check_images: bool = True
    fetch_urls: bool = False


class SampleValidator:
    """Encodes a sample as training does, without pixel values."""

    def __init__(self, processor: Owl2Processor, config: ValidationConfig) -> None:
        self.processor = processor
        self.config = config

    def validate(self, sample: Sample | InvalidSample) -> SampleStats | InvalidSample:
        """The sizes of a valid sample, or the error that training would raise."""
        if isinstance(sample, InvalidSample):
            return sample
        max_length = self.config.max_length
        try:
            features = self.processor.for_training(
                sample.messages, max_length, return_pixel_values=False
            )
            images = parse_messages(sample.messages).images
            sizes = self.image_sizes(images)
            require_labels(dict(features), max_length)
        except InputError as error:
            return InvalidSample.from_error(sample.source, error)
        tokens = features["input_ids"].shape[-1]
        if tokens == max_length:  # this long, or truncated
            tokens = self.processor.count_tokens(sample.messages)
        return SampleStats(
            turns=len(sample.messages),
            images=len(images),
            tokens=tokens,
            labels=int((features["labels"] != IGNORE_INDEX).sum()),
            is_truncated=max_length is not None and tokens > max_length,
            sizes=tuple(sizes),
        )

    def image_sizes(self, images: Sequence[Any]) -> list[tuple[int, int]]:
        """(width, height) of the images that the configuration opens.

        Raises:
            InputError: An image cannot be read.
        """
        opened = [image for image in images if self._is_opened(image)]
        max_pixels = self.processor.image_processor.max_pixels
        return [load_image(image, max_pixels).size for image in opened]

    def _is_opened(self, image: Any) -> bool:
        is_url = isinstance(image, str) and image.lower().startswith(("http://", "https://"))
        return self.config.check_images and (self.config.fetch_urls or not is_url)


def sample_hash(messages: Sequence[Message]) -> int:
    """64 bits of a hash of the texts and the images (their paths, or their bytes)."""
    text = json.dumps(messages, sort_keys=True, default=_image_hash)
    return int.from_bytes(_digest(text.encode()), "little")


def _image_hash(value: Any) -> str:
    data = value.tobytes() if isinstance(value, Image.Image) else value
    return _digest(data).hex() if isinstance(data, bytes) else str(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


# ------------------------------------------------------------------ work items


@dataclass(frozen=True)
class WorkItem:
    """The rows from `start` to `stop` of dataset number `dataset`, or its shard `start`."""

    dataset: int
    start: int
    stop: int


@dataclass
class WorkResult:
    """The invalid samples of an item in order, its statistics, and a hash per valid sample."""

    item: WorkItem
    invalid: list[InvalidSample] = field(default_factory=list)
    stats: DatasetStats = field(default_factory=DatasetStats)
    hashes: list[int] = field(default_factory=list)


def work_items(datasets: Sequence[SampleDataset]) -> list[WorkItem]:
    """All items in the order of the data."""
    items = []
    for number, samples in enumerate(datasets):
        is_stream = isinstance(samples, TarDataset)
        size = len(samples.urls) if isinstance(samples, TarDataset) else len(samples)
        step = 1 if is_stream else ROWS_PER_ITEM
        items += [WorkItem(number, i, min(i + step, size)) for i in range(0, size, step)]
    return items


@contextmanager
def validate_all(
    datasets: Sequence[SampleDataset], validator: SampleValidator, num_workers: int, stop: Event
) -> Iterator[Iterator[WorkResult]]:
    """The results of all items, in order for any number of workers.

    The workers start on entering. Callers start their threads afterwards, because a forked process
    inherits locks that other threads hold. After `stop` is set, started items end early, and no
    further items start.

    Raises:
        InputError: A worker was killed, for example by the system for lack of memory.
    """
    items = work_items(datasets)
    validate = partial(_validate_item, datasets, validator, stop)
    num_workers = min(num_workers, len(items))
    if num_workers <= 1:
        yield (validate(item) for item in items if not stop.is_set())
        return
    with ProcessPoolExecutor(num_workers, mp_context(), _init_worker, (validate,)) as pool:
        try:
            yield _in_order(pool, items, num_workers * ITEMS_AHEAD, stop)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed. If memory was short, use fewer --workers.",
                ErrorCode.PROCESS_FAILED,
            ) from error
        except BaseException:
            stop.set()  # otherwise the pool waits for all submitted items
            raise


def _in_order(
    pool: ProcessPoolExecutor, items: Sequence[WorkItem], ahead: int, stop: Event
) -> Iterator[WorkResult]:
    remaining = iter(items)
    started = deque(pool.submit(_run_worker, item) for item in islice(remaining, ahead))
    while started:
        yield started.popleft().result()
        if not stop.is_set():
            started.extend(pool.submit(_run_worker, item) for item in islice(remaining, 1))


def _validate_item(
    datasets: Sequence[SampleDataset], validator: SampleValidator, stop: Event, item: WorkItem
) -> WorkResult:
    """Validates the samples of an item; fewer of them after `stop` is set."""
    result = WorkResult(item)
    for sample in _samples(datasets[item.dataset], item):
        if stop.is_set():
            break
        stats = validator.validate(sample)
        if isinstance(stats, InvalidSample):
            result.invalid.append(stats)
            result.stats.invalid[stats.code] += 1
        elif isinstance(sample, Sample):
            result.stats.add(stats)
            result.hashes.append(sample_hash(sample.messages))
    return result


def _samples(samples: SampleDataset, item: WorkItem) -> Iterator[Sample | InvalidSample]:
    if not isinstance(samples, TarDataset):
        yield from (get_or_invalid(samples, row) for row in range(item.start, item.stop))
        return
    url = samples.urls[item.start]
    try:
        yield from TarDataset([url])
    except InputError as error:  # about the shard: missing, or not a tar file
        yield InvalidSample.from_error(url, error)


def mp_context() -> BaseContext:
    """Fork on Linux, because importing torch takes seconds."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


_worker: Callable[[WorkItem], WorkResult] | None = None


def _init_worker(validate: Callable[[WorkItem], WorkResult]) -> None:
    global _worker
    _worker = validate
    torch.set_num_threads(1)  # the workers run in parallel
    # Ctrl-C reaches all processes of a terminal; the main process decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_worker(item: WorkItem) -> WorkResult:
    assert _worker is not None  # set by `_init_worker`
    return _worker(item)
