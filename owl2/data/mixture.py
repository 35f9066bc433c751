"""Several sources of Samples → one endless order of them, the same for all processes of a run.

::

    position    0  1  2  3  4  ...    of the run
    source      b  a  b  b  a         by chance: from what an epoch still has of each source, or by
                                      weights
    turn        0  0  1  2  1         how often that source has been drawn in the epoch
    sample      the turn-th place of a permutation of the source; or the next that its stream gives

Which source is drawn and which sample is a matter of (seed, epoch, position) alone. So the order
is the same whatever the number of processes and workers, and a state is a handful of numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

from owl2.data.sample import Bad, Sample
from owl2.errors import InputError

# Weights become whole numbers of this order, so that choosing is exact on every machine.
_WEIGHT_UNITS = 1 << 40
_ROUNDS = 6


@runtime_checkable
class Stream(Protocol):
    """Samples without places: they come one after another, epoch after epoch, without an end."""

    def stream(
        self, *, seed: int, window: int, rank: int, world: int, state: dict[str, Any] | None
    ) -> Iterator[tuple[Sample | Bad, dict[str, Any]]]:
        """The share of process `rank` of `world`: samples, each with the state after it.

        Samples are shuffled in windows of `window`. `state`: go on after it.
        """


@dataclass(frozen=True)
class Source:
    """Where samples come from, and how many of them an epoch has (`count`; None: each once).

    Instead of a count, every source of a mixture may have a `weight`: its share, without epochs.
    """

    samples: Sequence[Sample] | Stream
    count: int | None = None
    weight: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Draw:
    """What is taken at one position: the `turn`-th of a source in an epoch; 0, 1, ... all three.

    `sample`: what a stream gave; None for another process' share, and for sources with places.
    """

    source: int
    epoch: int
    turn: int
    sample: Sample | Bad | None = None


class Mixture:
    """The sources of a run, and by `draws` the order in which their Samples are taken.

    Where a source has a count, every epoch draws anew: without repetition if the source has that
    many, else each sample as often as the others or once more.

    Attributes:
        epoch_size: samples in an epoch; None for weights, which have no epochs.

    Raises:
        InputError: no source, one without samples, a count below 1 or a weight of 0 or less, a
            stream without either, weights for some sources only.
    """

    def __init__(self, sources: Iterable[Source], seed: int = 0, window: int = 1000) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.window = window
        if not self.sources:
            raise InputError("There is nothing to train on: give at least one source of data.")
        for number, source in enumerate(self.sources):
            _check(source, self.name(number))
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise InputError("Give every source of the data a weight, or none.")
        self.shares = _weights(self.sources) if weighted[0] else _counts(self.sources)
        self.epoch_size = None if weighted[0] else sum(self.shares)

    def name(self, number: int) -> str:
        """What people know a source by."""
        return self.sources[number].name or f"Source {number} of the data"

    @property
    def sizes(self) -> list[int | None]:
        """How many samples each source has; None for streams. The order hangs on them."""
        return [
            None if isinstance(source.samples, Stream) else len(source.samples)
            for source in self.sources
        ]

    @property
    def has_streams(self) -> bool:
        """Whether some samples come without places."""
        return any(isinstance(source.samples, Stream) for source in self.sources)

    def draws(self, rank: int = 0, world: int = 1, state: dict[str, Any] | None = None) -> "Draws":
        """The order as process `rank` of `world` follows it, from the start or after `state`."""
        return Draws(self, rank, world, state)

    def __getitem__(self, draw: Draw) -> Sample | Bad:
        """The sample of a draw. Raises `InputError` where its row cannot be used."""
        if draw.sample is not None:
            return draw.sample
        samples = self.sources[draw.source].samples
        assert not isinstance(samples, Stream), "the draw is another process'"
        size = len(samples)
        turn, place = divmod(draw.turn, size)
        return samples[permuted(place, size, self.seed, draw.epoch, draw.source, turn)]


class Draws:
    """A walk through the order of a mixture."""

    def __init__(
        self, mixture: Mixture, rank: int, world: int, state: dict[str, Any] | None
    ) -> None:
        self.mixture = mixture
        self.rank, self.world = rank, world
        state = state or {"epoch": 0, "place": 0, "turns": [0] * len(mixture.sources)}
        self._epoch: int = state["epoch"]
        self._place: int = state["place"]
        self._turns: list[int] = list(state["turns"])
        self._states: dict[str, Any] = dict(state.get("streams", {}))
        self._streams: dict[int, Iterator[tuple[Sample | Bad, dict[str, Any]]]] = {}

    def state(self) -> dict[str, Any]:
        """Where the walk stands, for JSON. With streams every process has its own."""
        return {
            "epoch": self._epoch,
            "place": self._place,
            "turns": list(self._turns),
            "streams": dict(self._states),
        }

    def take(self, count: int) -> list[Draw]:
        """The draws of the next `count` positions, a multiple of the number of processes.

        They are those of all processes, as every one needs to know what is used up; this one's
        are [rank::world]. Only for those a stream is read.
        """
        return [self._next(index % self.world == self.rank) for index in range(count)]

    def _next(self, own: bool) -> Draw:
        mixture = self.mixture
        if self._place == mixture.epoch_size:
            self._epoch, self._place, self._turns = self._epoch + 1, 0, [0] * len(self._turns)
        left = mixture.shares
        if mixture.epoch_size is not None:
            left = [share - turn for share, turn in zip(left, self._turns, strict=True)]
        number = _chosen(left, _chance(mixture.seed, self._epoch, self._place))
        turn = self._turns[number]
        self._place += 1
        self._turns[number] += 1
        streamed = own and isinstance(mixture.sources[number].samples, Stream)
        return Draw(number, self._epoch, turn, self._read(number) if streamed else None)

    def _read(self, number: int) -> Sample | Bad:
        source = self.mixture.sources[number].samples
        assert isinstance(source, Stream)
        if number not in self._streams:
            self._streams[number] = source.stream(
                seed=self.mixture.seed,
                window=self.mixture.window,
                rank=self.rank,
                world=self.world,
                state=self._states.get(str(number)),
            )
        found = next(self._streams[number], None)
        if found is None:
            raise InputError(f"{self.mixture.name(number)} has no samples.")
        sample, self._states[str(number)] = found
        return sample


def permuted(place: int, size: int, *key: int) -> int:
    """The number at `place` of a permutation of 0 … size-1, a different one for each `key`.

    Takes no memory, however large `size`: a Feistel network permutes the next larger square of a
    power of two, and is walked along until it comes back below `size` (Black & Rogaway, "Ciphers
    with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_chance(*key, number, right) & mask)
        place = left << half | right
        if place < size:
            return place


def _chance(*key: int) -> int:
    """64 bits, the same for the same key in every version of everything."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest())


def _chosen(shares: Sequence[int], chance: int) -> int:
    """The place in `shares` that 64 bits of chance fall on, each as likely as its share."""
    mark = sum(shares) * chance >> 64
    for number, share in enumerate(shares):
        mark -= share
        if mark < 0:
            return number
    raise AssertionError("nothing is left to choose from")


def _counts(sources: Sequence[Source]) -> list[int]:
    counts = []
    for source in sources:
        if source.count is not None:
            counts.append(source.count)
        else:
            assert not isinstance(source.samples, Stream)  # checked
            counts.append(len(source.samples))
    return counts


def _weights(sources: Sequence[Source]) -> list[int]:
    weights = [source.weight or 0.0 for source in sources]
    return [max(1, round(weight / sum(weights) * _WEIGHT_UNITS)) for weight in weights]


def _check(source: Source, name: str) -> None:
    if source.count is not None and source.count < 1:
        raise InputError(f"{name}: count is {source.count}, below 1.")
    if source.weight is not None and not source.weight > 0:
        raise InputError(f"{name}: weight is {source.weight}; it must be above 0.")
    if not isinstance(source.samples, Stream):
        if not len(source.samples):
            raise InputError(f"{name} has no samples.")
    elif source.count is None and source.weight is None:
        raise InputError(
            f"{name} is read as a stream, so nobody knows how many samples it has: give it a "
            "`count` (samples an epoch), or every source a `weight`."
        )
