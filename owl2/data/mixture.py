"""Several sources of Samples → one dataset, with a count of Samples a source and epoch.

::

    source 0: all its samples ─┐
    source 1: `count` drawn ───┴─► indices 0 … len-1, source after source; the sampler shuffles
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from torch.utils.data import Dataset

from owl2.data.sample import Sample
from owl2.errors import InputError


@dataclass(frozen=True)
class Source:
    """`samples`, and how many of them an epoch has; None: each once."""

    samples: Sequence[Sample]
    count: int | None = None


class Mixture(Dataset[Sample]):
    """The sources' Samples, map-style.

    Where a source has a count, every epoch draws anew: without repetition if the source has that
    many, else each sample as often as the others or once more. What is drawn depends on `seed`,
    the epoch and the source's place only. `len` is the same in every epoch.

    Raises:
        InputError: no source, one without samples, or a count below 1.
    """

    def __init__(self, sources: Iterable[Source], seed: int = 0) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.epoch = 0
        if not self.sources:
            raise InputError("There is nothing to train on: give at least one source of data.")
        for number, source in enumerate(self.sources):
            if not len(source.samples):
                raise InputError(f"Source {number} of the data has no samples.")
            if source.count is not None and source.count < 1:
                raise InputError(f"Source {number} of the data: count is {source.count}, below 1.")
        self._draw()

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of this epoch (0, 1, ...)."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._draw()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        source, place = self._places[index]
        return self.sources[source].samples[place]

    def _draw(self) -> None:
        self._places = [
            (number, place)
            for number, source in enumerate(self.sources)
            for place in _drawn(source, Random(f"{self.seed}/{self.epoch}/{number}"))
        ]


def _drawn(source: Source, chance: Random) -> list[int]:
    size = len(source.samples)
    if source.count is None:
        return list(range(size))
    whole, rest = divmod(source.count, size)
    return list(range(size)) * whole + chance.sample(range(size), rest)
