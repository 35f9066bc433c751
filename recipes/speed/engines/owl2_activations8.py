"""owl2 with quantized weights and `activation_bits=8`, as OpenVINO and llama.cpp compute."""

from engines import Answer, Task, owl2
from engines.owl2 import PACKAGES

__all__ = ["BITS", "PACKAGES", "prepare"]
BITS = (8, 4)


def prepare(task: Task) -> Answer:
    """See `engines`."""
    return owl2.prepare(task, activation_bits=8)
