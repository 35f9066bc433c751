"""FSDP2 in one process: the losses of a small model equal those without FSDP2."""

from step import Step, main
from training import compare_losses


def check(step: Step) -> None:
    """See `compare_losses`."""
    compare_losses(step, "fsdp2")


if __name__ == "__main__":
    main(check)
