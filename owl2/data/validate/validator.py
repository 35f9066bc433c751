"""Validates every sample as training encodes it, in several processes.

::

    datasets ──split into work items──► workers: SampleValidator ──► WorkResult per item

A work item is some rows of a dataset, or one shard of a stream. A sample is encoded by the function
that training uses, without pixel values: the images are only opened.
"""

import hashlib
import json
import multiprocessing
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import require_labels
from owl2.data.dataloader import iter_ignoring_signals, require_shared_memory
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample, Message, Sample, get_or_invalid
from owl2.data.score_labels import ScoreLabels
from owl2.data.validate.statistics import DatasetStats, SampleStats
from owl2.data.webdataset import TarDataset
from owl2.errors import InputError
from owl2.processing.image_io import load_image
from owl2.processing.labeling import encode_labeled
from owl2.processing.messages import parse_messages
from owl2.processing.prepared_prompt import images_of
from owl2.processing.processor import Owl2Processor
from owl2.processing.video import SampledFrame

ROWS_PER_ITEM = 100
ITEMS_AHEAD = 4  # per worker: enough that no worker waits, few enough to bound the memory


@dataclass(frozen=True)
class SampleValidator:
    """Encodes a sample as training does, without pixel values.

    Attributes:
        max_length: Samples are truncated to this many tokens; None for no limit.
        check_images: Open the images. Broken images are found in no other way.
        fetch_urls: Also open images behind http(s) URLs.
        score_labels: Of training with opinion scores, see `encode_sample`.
    """

    processor: Owl2Processor
    max_length: int | None = None
    check_images: bool = True
    fetch_urls: bool = False
    score_labels: ScoreLabels | None = None

    def validate(self, sample: Sample | InvalidSample) -> SampleStats | InvalidSample:
        """The sizes of a valid sample, or the error that training would raise."""
        if isinstance(sample, InvalidSample):
            return sample
        try:
            features = self.processor.for_training(
                sample.messages, self.max_length, return_pixel_values=False
            )
            conversation = parse_messages(sample.messages)
            images = images_of(conversation, self.processor.num_frames)
            max_pixels = self.processor.image_processor.max_pixels
            sizes = tuple(load_image(i, max_pixels).size for i in images if self._is_opened(i))
            require_labels(dict(features), self.max_length)
            if self.score_labels is not None:
                self.score_labels.add(sample, dict(features))
        except InputError as error:
            return InvalidSample.from_error(sample.source, error)
        tokens = features["input_ids"].shape[-1]
        if tokens == self.max_length:  # this long, or truncated
            tokens = len(encode_labeled(self.processor, conversation)[0].ids)
        return SampleStats(
            turns=len(sample.messages),
            images=len(images),
            tokens=tokens,
            labels=int((features["labels"] != IGNORE_INDEX).sum()),
            is_truncated=self.max_length is not None and tokens > self.max_length,
            sizes=sizes,
            unused_keys=sample.unused_keys,
        )

    def _is_opened(self, image: object) -> bool:
        name = image.video.source if isinstance(image, SampledFrame) else image
        is_url = isinstance(name, str) and name.lower().startswith(("http://", "https://"))
        return self.check_images and (self.fetch_urls or not is_url)


def sample_hash(messages: Sequence[Message]) -> int:
    """64 bits of a hash of the texts and the images (their paths, or their bytes)."""

    def image_hash(value: object) -> str:
        data = value.tobytes() if isinstance(value, Image.Image) else value
        return hashlib.blake2b(data).hexdigest() if isinstance(data, bytes) else str(data)

    text = json.dumps(messages, sort_keys=True, default=image_hash)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# ------------------------------------------------------------------ work items


@dataclass
class WorkResult:
    """The invalid samples of an item in order, its statistics, and a hash per valid sample."""

    dataset: str
    invalid: list[InvalidSample] = field(default_factory=list)
    stats: DatasetStats = field(default_factory=DatasetStats)
    hashes: list[int] = field(default_factory=list)


class WorkItems(Dataset[WorkResult]):
    """The results of all items in the order of the data, computed when they are accessed.

    Args:
        num_workers: Processes; 1 uses the main process and no shared memory.

    Attributes:
        stop: After it is set, an item ends early, with the samples so far.
    """

    def __init__(
        self, datasets: Mapping[str, SampleDataset], validator: SampleValidator, num_workers: int
    ) -> None:
        self.datasets = datasets
        self.validator = validator
        # The dataset and its rows; of a stream one shard.
        self.items: list[tuple[str, range]] = []
        for name, samples in datasets.items():
            if isinstance(samples, TarDataset):
                rows, step = range(len(samples.urls)), 1
            else:
                rows, step = range(len(samples)), ROWS_PER_ITEM
            self.items += [(name, rows[i : i + step]) for i in range(0, len(rows), step)]
        self.num_workers = min(num_workers, len(self.items)) if num_workers > 1 else 0
        if self.num_workers:
            require_shared_memory()
        self.stop = multiprocessing.Event() if self.num_workers else threading.Event()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> WorkResult:
        name, rows = self.items[index]
        result = WorkResult(name)
        for sample in self._samples(name, rows):
            if self.stop.is_set():
                break
            stats = self.validator.validate(sample)
            if isinstance(stats, InvalidSample):
                result.invalid.append(stats)
                result.stats.invalid[stats.code] += 1
            elif isinstance(sample, Sample):
                result.stats.add(stats)
                result.hashes.append(sample_hash(sample.messages))
        return result

    def _samples(self, name: str, rows: range) -> Iterator[Sample | InvalidSample]:
        samples = self.datasets[name]
        if not isinstance(samples, TarDataset):
            yield from (get_or_invalid(samples, row) for row in rows)
            return
        url = samples.urls[rows[0]]
        try:
            yield from TarDataset([url])
        except InputError as error:  # about the shard: missing, or not a tar file
            yield InvalidSample.from_error(url, error)

    @contextmanager
    def results(self) -> Iterator[Iterator[WorkResult]]:
        """The results in order, for any number of worker processes.

        The workers start on entering. Callers start their threads afterwards, because a forked
        process inherits locks that other threads hold.

        Raises:
            InputError: See `iter_ignoring_signals`.
        """
        ahead = ITEMS_AHEAD if self.num_workers else None
        loader = DataLoader(
            self, batch_size=None, num_workers=self.num_workers, prefetch_factor=ahead
        )
        try:
            yield iter_ignoring_signals(loader)
        except BaseException:
            self.stop.set()  # otherwise the loader waits for the items of its workers
            raise
