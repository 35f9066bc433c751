"""The most memory that training takes, measured in a process of its own.

    python -m owl2.bench.memory WHO ORIGIN     prints bytes; ORIGIN is `Origin` as JSON

On a CPU: the most resident memory, less what the process held before it made the model, so weights,
gradients, the optimizer's state, activations and whatever else two steps need. On a GPU: the most
bytes of tensors at one time.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from owl2.bench.presets import Origin
from owl2.bench.training import Training
from owl2.train.recipe import Checkpointing

COUNT = 2  # the optimizer's state is made in the first
STEPS: dict[str, tuple[Checkpointing, Callable[[Training], object]]] = {
    "textbook": (False, Training.textbook_step),
    "owl2": ("selective", Training.padded_step),
    "all_kept": (False, Training.padded_step),
    "least_kept": (True, Training.padded_step),
}
STATUS = Path("/proc/self/status")


class NotMeasured(Exception):
    """A figure that this machine has no room for."""


def step_memory(who: str, origin: Origin) -> float:
    """Bytes at most of `who`'s training steps, one of `STEPS`.

    Raises:
        NotMeasured: the process ended without an answer, as one does when memory runs out.
    """
    command = [sys.executable, "-m", "owl2.bench.memory", who, json.dumps(asdict(origin))]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing; was it out of memory?"])[-1]
        raise NotMeasured(f"the process of {who} ended with {done.returncode}: {last}")
    return float(done.stdout.splitlines()[-1])


def measure(who: str, origin: Origin) -> float:
    """The same in this process, which should have done nothing before."""
    before = psutil.Process().memory_info().rss
    checkpointing, step = STEPS[who]
    training = Training(origin, checkpointing)
    for _ in range(COUNT):
        step(training)
    if training.model.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(training.model.device))
    return float(peak_resident() - before)


def peak_resident() -> int:
    """Bytes that this process held resident at most."""
    if STATUS.exists():
        # Not getrusage: its maximum is inherited from the process that started this one.
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str]) -> None:
    who, origin = arguments
    print(measure(who, Origin(**json.loads(origin))))


if __name__ == "__main__":
    main(sys.argv[1:])
