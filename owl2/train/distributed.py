"""The processes that train together: what they agree on, and how an error ends all of them.

`accelerate launch` or `torchrun` starts them and says by the environment how many they are. One
process alone is a team, too. Processes wait for each other at every gradient, so none may stop,
save or fail by itself: what one of them knows is exchanged first. That goes over gloo, between
CPUs, also where gradients go over NCCL: it does not wait for what the GPUs still have to do.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import distributed

from owl2.errors import InputError

# Saving many gigabytes takes one process this long at most, while the others wait.
PATIENCE = timedelta(hours=2)
# Launchers end all processes when one has ended: the first must have said by then what was wrong.
HEAD_START = 5.0

SHARING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


class Team:
    """This process and those beside it.

    Attributes:
        rank: this process' number, from 0; `size`: how many there are.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        """A team of one without a `group`."""
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    @classmethod
    @contextmanager
    def gathered(cls) -> Iterator["Team"]:
        """The processes that a launcher started, in contact with each other."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        began = not distributed.is_initialized()
        if os.environ.get(SHARING["DeepSpeed"]) == "true" and find_spec("deepspeed") is None:
            raise InputError("DeepSpeed is not installed: pip install deepspeed")
        if not torch.cuda.is_available():
            # Else it is "cpu:0", where transformers 5.16 would load a state to, and torch cannot.
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        team = cls(distributed.new_group(backend="gloo", timeout=PATIENCE))
        try:
            yield team
        except InputError:
            # If the first has met the same, it says so, and then the launcher ends this process.
            if began and not team.first:
                time.sleep(HEAD_START)
            raise
        if began:  # not after an exception: the others may be waiting, and this process ends
            distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes for all."""
        return self.rank == 0

    @property
    def sharing(self) -> str:
        """How weights and optimizer states are shared out, as the launcher's configuration says."""
        for how, setting in SHARING.items():
            if os.environ.get(setting, "false").lower() == "true":
                return how
        return "each whole"

    def total(self, *numbers: float) -> list[float]:
        """The sums of all processes' numbers, the same in each; all must ask."""
        if self._group is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(sums, group=self._group)
        return sums.tolist()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process' user error in this block ends, ends in all; waits for all at its end.

        Raises:
            InputError: in the first process, the error of the lowest rank that had one. The others
                end with exit code 2 and without a word, as one message is enough.
        """
        error = None
        try:
            yield
        except InputError as caught:
            error = caught
        if self._group is None:
            if error is not None:
                raise error
            return
        if not self.total(error is not None)[0]:
            return
        messages: list[str | None] = [None] * self.size
        said = None if error is None else str(error)
        distributed.all_gather_object(messages, said, group=self._group)
        if not self.first:
            time.sleep(HEAD_START)
            raise SystemExit(2)
        if error is not None:
            raise error
        raise InputError(next(message for message in messages if message is not None))
