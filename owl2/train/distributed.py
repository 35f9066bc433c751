"""The processes of a training run: sums over them, and errors that end all of them.

`accelerate launch` or `torchrun` starts the processes and describes them in the environment. A
process may not stop, save or fail alone, because the others would wait for it at the next gradient.
Control messages use gloo on the CPUs also where gradients use NCCL, so that they do not wait for
queued GPU work.
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
from accelerate.utils import parse_flag_from_env
from torch import distributed

from owl2.checkpoints.lazy_weights import RankShare, loaded_share
from owl2.errors import ErrorCode, InputError

# The others wait while one process saves a large model.
TIMEOUT = timedelta(hours=2)
# Launchers end all processes when one has ended; the main process must have printed its error.
HEAD_START = 5.0
SHARDING_VARIABLES = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


class DistributedContext:
    """This process among the processes of a run; a single process has rank 0 of 1.

    Attributes:
        rank: From 0.
        world_size: Number of processes.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.world_size = 1 if group is None else distributed.get_world_size(group)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator["DistributedContext"]:
        """Open the process group that a launcher has configured, and close it at the end.

        Raises:
            InputError: DeepSpeed is configured but not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        if cls().sharding == "DeepSpeed" and not find_spec("deepspeed"):
            raise InputError(
                "DeepSpeed is not installed: pip install deepspeed", ErrorCode.MISSING_DEPENDENCY
            )
        if not torch.cuda.is_available():
            # transformers 5.16 passes the default "cpu:0" to torch.load, which refuses it.
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        opens = not distributed.is_initialized()  # the caller may have opened it
        PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
        context = cls(distributed.new_group(backend="gloo", timeout=TIMEOUT))
        try:
            yield context
        except InputError:
            # The main process may report the same error, and then the launcher ends this one.
            if opens and not context.is_main:
                time.sleep(HEAD_START)
            raise
        if opens:  # not after an exception: the others may be waiting, and this process ends
            distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def sharding(self) -> str | None:
        """ "FSDP" or "DeepSpeed" if weights and optimizer states are sharded, else None."""
        for name, variable in SHARDING_VARIABLES.items():
            if os.environ.get(variable, "").lower() == "true":
                return name
        return None

    @contextmanager
    def load_share(self) -> Iterator[None]:
        """With FSDP2, models that are loaded in this block have only the values that this process
        keeps when they are sharded."""
        splits_rows = self.sharding == "FSDP" and _splits_rows_over_all_processes()
        share = RankShare(self.rank, self.world_size) if splits_rows else None
        token = loaded_share.set(share)
        try:
            yield
        finally:
            loaded_share.reset(token)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes. All processes must call it."""
        if self._group is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums, group=self._group)
        return sums.tolist()

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """End all processes if one raises an InputError in this block; a barrier at its end.

        Raises:
            InputError: In the main process, the error of the lowest rank that raised one. The
                other processes exit with code 2 without a message, because one message is enough.
        """
        error = None
        try:
            yield
        except InputError as caught:
            error = caught
        if self._group is None or not self.all_reduce_sum(error is not None)[0]:
            if error is not None:
                raise error
            return
        errors: list[tuple[str, ErrorCode] | None] = [None] * self.world_size
        own = None if error is None else (str(error), error.code)
        distributed.all_gather_object(errors, own, group=self._group)
        if not self.is_main:
            time.sleep(HEAD_START)
            raise SystemExit(2)
        if error is not None:
            raise error
        raise InputError(*next(found for found in errors if found is not None))


def _splits_rows_over_all_processes() -> bool:
    """Whether accelerate's FSDP gives each process an equal part of the rows of each weight.

    FSDP1 splits the values of a layer together. Otherwise, all processes need complete weights if
    the main process sends them, or if some weights are not sharded or are sharded several times.
    """
    return (
        os.environ.get("FSDP_VERSION") == "2"
        and not parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")
        and not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")
        and not os.environ.get("FSDP_IGNORED_MODULES")
    )
