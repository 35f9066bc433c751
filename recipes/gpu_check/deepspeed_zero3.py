"""DeepSpeed ZeRO-3 in one process: the losses of a small model equal those without it."""

import importlib.util

from step import SkippedError, Step, main
from training import compare_losses


def check(step: Step) -> None:
    """See `compare_losses`."""
    if importlib.util.find_spec("deepspeed") is None:
        raise SkippedError("DeepSpeed is not installed (pip install deepspeed)")
    if step.dry:
        raise SkippedError("owl2 trains with DeepSpeed on GPUs only")
    compare_losses(step, "deepspeed_zero3")


if __name__ == "__main__":
    main(check)
