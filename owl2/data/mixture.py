"""A mixture of datasets: which sample comes at which position, and its features.

::

    MixtureSampler ──SampleIndex──► MixtureDataset[index] ──encode_sample──► Features

    position     0  1  2  3  4  ...
    source       1  0  1  1  0        a random order of the sources' samples of the epoch, or a
                                      source drawn by weight
    draw         0  0  1  2  1        how often the source was drawn before in this epoch
    row          7  3  0  9  8        the draw-th row of a random permutation of the source; a
                                      stream returns its next sample instead

The order depends on the seed only. All processes compute the same order, whatever their number,
and the state of a sampler is a few integers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from owl2.data.augment import AUGMENTATIONS
from owl2.data.collate import Features, encode_sample
from owl2.data.sample import InvalidSample, Sample, get_or_invalid
from owl2.data.score_labels import ScoreLabels
from owl2.data.webdataset import TarDataset
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.processing.processor import Owl2Processor
from owl2.registry import Option, PositiveInteger, PositiveNumber, check_options, look_up

# Sources with weights have no epochs. Their order is drawn in blocks of this many positions.
BLOCK_SIZE = 1 << 16

State = dict[str, Any]

# The same ranges as in recipes.
_RANGES = {
    "count": Option(PositiveInteger | None, None),
    "weight": Option(PositiveNumber | None, None),
    "shuffle_buffer": Option(PositiveInteger, 1000),
}


@dataclass(frozen=True)
class MixtureSource:
    """A dataset of a mixture.

    Attributes:
        count: Samples per epoch, at least 1; None for every sample once.
        weight: Relative share of the samples, above 0, without epochs. Either all sources of a
            mixture have a weight, or none.
        name: Used in error messages.
    """

    samples: Sequence[Sample] | TarDataset
    count: int | None = None
    weight: float | None = None
    name: str = ""


class SampleIndex(NamedTuple):
    """A position of the mixture.

    Attributes:
        source: Index of the source.
        epoch: 0 for sources with weights.
        draw: How often the source was drawn before in this epoch.
        row: Row of the source; None for streams.
        sample: The sample of a stream; None for the positions of other processes.
        is_partner: See `MixtureDataset.partner`.
    """

    source: int
    epoch: int
    draw: int
    row: int | None
    sample: Sample | InvalidSample | None = None
    is_partner: bool = False


class MixtureDataset(Dataset[Features | InvalidSample]):
    """Encodes the samples of several sources; the indices come from a `MixtureSampler`.

    A source with a `count` below its size gives other samples in each epoch, without repetition
    within the epoch. With a `count` above its size, every sample comes equally often or once more.

    Args:
        shuffle_buffer: Samples of a stream that are kept in memory for shuffling.
        augment: A name in `AUGMENTATIONS`. The random numbers depend on `seed`, the epoch and the
            draw, not on the worker.
        max_length, score_labels: See `encode_sample`.

    Attributes:
        epoch_size: Samples per epoch; None for sources with weights.
        sizes: Samples in each source, None for streams. The order of the samples depends on them.

    Raises:
        InputError: No source, a source without samples, a value out of its range, a stream without
            count and weight, or weights for some sources only.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        processor: Owl2Processor,
        *,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        augment: str = "none",
        max_length: int | None = None,
        score_labels: ScoreLabels | None = None,
    ) -> None:
        self.sources = list(sources)
        self.processor = processor
        self.seed = seed
        check_options("setting", _RANGES, {"shuffle_buffer": shuffle_buffer})
        self.shuffle_buffer = shuffle_buffer
        self.augmentation = look_up("augmentation", augment, AUGMENTATIONS)
        self.max_length = max_length
        self.score_labels = score_labels
        if not self.sources:
            raise InputError("no training data: add a source to `data`", ErrorCode.EMPTY_DATASET)
        self.counts = [_epoch_count(source, i) for i, source in enumerate(self.sources)]
        self.weights = [source.weight for source in self.sources if source.weight is not None]
        if 0 < len(self.weights) < len(self.sources):
            raise InputError(
                "either all sources of the data need a `weight`, or none", ErrorCode.CONFLICT
            )
        self.epoch_size = None if self.weights else sum(self.counts)
        self.sizes = [
            None if isinstance(source.samples, TarDataset) else len(source.samples)
            for source in self.sources
        ]

    def sample(self, index: SampleIndex) -> Sample | InvalidSample:
        """The sample at `index`, not encoded."""
        if index.row is not None:
            samples = self.sources[index.source].samples
            assert not isinstance(samples, TarDataset)
            return get_or_invalid(samples, index.row)
        assert index.sample is not None, "the position belongs to another process"
        return index.sample

    def partner(self, index: SampleIndex) -> SampleIndex:
        """Another row of the same source, drawn at random, for losses over pairs.

        It depends on `seed` and the index only, so the order of pairs needs no state.
        """
        row, size = index.row, self.sizes[index.source]
        if row is None or size is None or size < 2:
            name = self.sources[index.source].name or f"source {index.source} of the data"
            raise InputError(
                f"{name}: a loss over pairs needs a file or dataset with at least two rows, "
                "not shards",
                ErrorCode.UNSUPPORTED,
            )
        other = Random(f"{self._key(index)}/partner").randrange(size - 1)
        return index._replace(row=other + (other >= row), is_partner=True)

    def __getitem__(self, index: SampleIndex) -> Features | InvalidSample:
        rng = Random(self._key(index) + "/augmentation" * index.is_partner)
        return encode_sample(
            self.sample(index),
            self.processor,
            self.max_length,
            self.augmentation,
            rng,
            self.score_labels,
        )

    def _key(self, index: SampleIndex) -> str:
        return f"{self.seed}/{index.epoch}/{index.source}/{index.draw}"


class MixtureSampler:
    """The endless order of the samples of a mixture, as process `rank` of `world_size` reads it.

    `state`: resumes after the position at which `state()` was called, with the same arguments.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        rank: int = 0,
        world_size: int = 1,
        state: State | None = None,
    ) -> None:
        self.dataset = dataset
        self.rank, self.world_size = rank, world_size
        state = state or {"epoch": 0, "position": 0, "draws": [0] * len(dataset.sources)}
        self._epoch: int = state["epoch"]
        self._position: int = state["position"]
        self._draws: list[int] = list(state["draws"])
        self._stream_states: dict[str, State] = dict(state.get("streams", {}))
        self._streams: dict[int, Iterator[tuple[Sample | InvalidSample, State]]] = {}
        self._order = self._source_order()
        self._permutations: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}

    def state(self) -> State:
        """The current position, as JSON. With streams it differs between processes."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "draws": list(self._draws),
            "streams": dict(self._stream_states),
        }

    def take(self, count: int) -> list[SampleIndex]:
        """The next `count` positions of all processes, a multiple of `world_size`.

        Those of this process are `[rank::world_size]`. Streams are read for these only.
        """
        return [self._next(i % self.world_size == self.rank) for i in range(count)]

    def _next(self, is_own: bool) -> SampleIndex:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._source_order()
            if not self.dataset.weights:
                self._draws = [0] * len(self._draws)
        source = int(self._order[self._position])
        draw = self._draws[source]
        self._position += 1
        self._draws[source] += 1
        epoch = 0 if self.dataset.weights else self._epoch
        if (size := self.dataset.sizes[source]) is not None:
            return SampleIndex(source, epoch, draw, self._row(size, source, epoch, draw))
        sample = self._read_stream(source) if is_own else None
        return SampleIndex(source, epoch, draw, None, sample)

    def _source_order(self) -> torch.Tensor:
        """(positions of the epoch or block,): the source of each."""
        generator = make_generator(self.dataset.seed, self._epoch)
        if self.dataset.weights:
            weights = torch.tensor(self.dataset.weights, dtype=torch.float64)
            return weights.multinomial(BLOCK_SIZE, replacement=True, generator=generator)
        counts = torch.tensor(self.dataset.counts)
        order = torch.arange(len(counts)).repeat_interleave(counts)
        return order[torch.randperm(len(order), generator=generator)]

    def _row(self, size: int, source: int, epoch: int, draw: int) -> int:
        repeat, place = divmod(draw, size)
        key = (self.dataset.seed, epoch, source, repeat)
        if self._permutations.get(source, (None,))[0] != key:
            permutation = torch.randperm(size, generator=make_generator(*key))
            self._permutations[source] = key, permutation
        return int(self._permutations[source][1][place])

    def _read_stream(self, source: int) -> Sample | InvalidSample:
        samples = self.dataset.sources[source].samples
        assert isinstance(samples, TarDataset)
        if source not in self._streams:
            self._streams[source] = samples.stream(
                seed=self.dataset.seed,
                shuffle_buffer=self.dataset.shuffle_buffer,
                rank=self.rank,
                world_size=self.world_size,
                state=self._stream_states.get(str(source)),
            )
        sample, self._stream_states[str(source)] = next(self._streams[source])
        return sample


def make_generator(*key: int) -> torch.Generator:
    """A generator with a seed that depends on `key` only."""
    # Random hashes the text with SHA-512, so that similar keys give unrelated seeds.
    return torch.Generator().manual_seed(Random(repr(key)).getrandbits(63))


def _epoch_count(source: MixtureSource, index: int) -> int:
    """Samples per epoch of a source without a weight; 0 for a stream with a weight."""
    name = source.name or f"source {index} of the data"
    with error_prefix(f"{name}: "):
        check_options("setting", _RANGES, {"count": source.count, "weight": source.weight})
    if not isinstance(source.samples, TarDataset):
        if not len(source.samples):
            raise InputError(f"{name} has no samples", ErrorCode.EMPTY_DATASET)
        return len(source.samples) if source.count is None else source.count
    if source.count is None and source.weight is None:
        raise InputError(
            f"{name} is a stream of unknown length: set `count` (samples per epoch), or give every "
            "source a `weight`",
            ErrorCode.MISSING_VALUE,
        )
    return source.count or 0
