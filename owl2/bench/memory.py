"""Peak memory of training steps, measured in a separate process.

    python -m owl2.bench.memory NAME SOURCE     prints bytes; SOURCE is a `BenchModel` as JSON

On a CPU, the peak resident memory less that before the model was created: weights, gradients,
optimizer states, activations and everything else of two steps. On a GPU, the peak memory of
tensors.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from owl2.bench.presets import BenchModel
from owl2.bench.training import TrainingSteps
from owl2.train.recipe import Checkpointing

NUM_STEPS = 2  # the first one creates the optimizer states
STEPS: dict[str, tuple[Checkpointing, Callable[[TrainingSteps], object]]] = {
    "baseline": (False, TrainingSteps.baseline_step),
    "owl2": ("selective", TrainingSteps.padded_step),
    "no_checkpointing": (False, TrainingSteps.padded_step),
    "full_checkpointing": (True, TrainingSteps.padded_step),
}
STATUS = Path("/proc/self/status")


class MeasurementError(Exception):
    """A case that cannot be measured on this machine."""


def step_memory(name: str, source: BenchModel) -> float:
    """Peak bytes of the training steps `name`, a key of `STEPS`.

    Raises:
        MeasurementError: the process failed, for example because memory ran out.
    """
    command = [sys.executable, "-m", "owl2.bench.memory", name, json.dumps(asdict(source))]
    process = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no output; possibly out of memory"])[-1]
        raise MeasurementError(f"the process for {name} exited with {process.returncode}: {last}")
    return float(process.stdout.splitlines()[-1])


def measure_steps(name: str, source: BenchModel) -> float:
    """Peak bytes of the training steps `name` in this process, which must be a fresh one."""
    before = psutil.Process().memory_info().rss
    checkpointing, step = STEPS[name]
    training = TrainingSteps(source, checkpointing)
    for _ in range(NUM_STEPS):
        step(training)
    if training.model.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(training.model.device))
    return float(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process."""
    if STATUS.exists():
        # Linux: the maximum of getrusage is inherited from the parent process.
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(measure_steps(sys.argv[1], BenchModel(**json.loads(sys.argv[2]))))
