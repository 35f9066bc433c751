"""A stream of numbered samples, as shards are one."""

from owl2.data.sample import Sample


class Numbered:
    """Samples NAME0, NAME1, … without end; a process of several gets every so-manieth."""

    def __init__(self, name):
        self.name = name
        self.asked = []

    def stream(self, *, seed, window, rank, world, state):
        self.asked.append((seed, window, rank, world, state))
        number = rank if state is None else state["next"]
        while True:
            messages = [
                {"role": "user", "content": f"number {number}?" + " so?" * (number % 7)},
                {"role": "assistant", "content": "yes"},
            ]
            yield Sample(messages, f"{self.name}{number}"), {"next": number + world}
            number += world
