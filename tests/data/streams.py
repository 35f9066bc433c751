"""A stream of numbered samples in place of those of tar files."""

from owl2.data.sample import Sample
from owl2.data.webdataset import TarDataset


class NumberedStream(TarDataset):
    """Endless samples NAME0, NAME1, ...; of `world_size` processes each reads every such sample.

    Attributes:
        calls: The arguments of all calls of `stream`.
    """

    def __init__(self, name):
        self.name = name
        self.calls = []

    def stream(self, *, seed, shuffle_buffer, rank, world_size, state):
        self.calls.append((seed, shuffle_buffer, rank, world_size, state))
        number = rank if state is None else state["next"]
        while True:
            messages = [
                {"role": "user", "content": f"number {number}?" + " so?" * (number % 7)},
                {"role": "assistant", "content": "yes"},
            ]
            yield Sample(messages, f"{self.name}{number}"), {"next": number + world_size}
            number += world_size
