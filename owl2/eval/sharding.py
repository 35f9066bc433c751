"""Several processes that evaluate together: each asks its share, and the first one scores all.

They say nothing to each other but through the files of answers (and signs of life beside them), so
that one which is slower, or which starts later, holds up nobody, and a GPU each is all that it
takes: ``torchrun``, ``accelerate launch`` or ``srun`` set the variables that are read here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from owl2.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Team:
    """Which process of how many this is.

    Attributes:
        rank: from 0.
        local_rank: among those of this machine, which is the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Team":
        """As RANK, WORLD_SIZE and LOCAL_RANK say; without them: one process.

        Raises:
            InputError: they are no numbers, or do not fit.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = {name: environment[name] for name in names if name in environment}
        try:
            numbers = {name: int(value) for name, value in given.items()}
        except ValueError as error:
            raise InputError(f"The process's place is no number: {given}") from error
        rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
        if not 0 <= rank < size:
            raise InputError(f"RANK is {rank}, WORLD_SIZE {size}: ranks go from 0 to size - 1.")
        return cls(rank, size, numbers.get("LOCAL_RANK", rank))

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What this process does of all: every `size`-th, so that each has long ones and short."""
        return list(items[self.rank :: self.size])

    def whose(self, place: int) -> int:
        """The rank of the process whose share has the item at `place`."""
        return place % self.size
