"""The engines that `compare.py` measures: one file each, imported in the engine's environment.

Each file defines `PACKAGES`, whose versions are recorded, `BITS`, the supported sizes of a weight,
and `prepare(task)`, which returns a function from prompts and a number of new tokens to the ids of
the answers. Models that an engine needs in a format of its own are converted by `prepare`, once.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prompts = Sequence[Sequence[int]]
Answer = Callable[[Prompts, int], list[list[int]]]  # prompts, new tokens → the answers' ids


@dataclass(frozen=True)
class Task:
    """What an engine has to prepare for.

    Attributes:
        folder: Contains `owl2`, the model, and `llama`, its decoder as a plain LLaMA.
        bits: Bits of a weight of the decoder: 16, 8 or 4.
        requests: The largest number of concurrent requests.
        positions: Tokens of a prompt and its answer.
        threads: Threads of the CPU.
    """

    folder: Path
    bits: int
    requests: int
    positions: int
    threads: int

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the decoder."""
        return json.loads((self.folder / "llama" / "config.json").read_text())
