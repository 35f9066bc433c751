"""Batches of a mixture, encoded by worker processes ahead of time, with a state for exact resume.

::

    MixtureBatchSampler ──[SampleIndex, ...]──► workers: MixtureDataset, Collator ──► Batch
             │                                                                          ▲
             └── state after the batch ──────── kept until the batch is returned ───────┘

All random decisions about the order are made in the main process. The workers are some batches
ahead, so the state of each batch is kept until the batch is returned. torchdata's
StatefulDataLoader does the same. It is not used because its last release (0.11, February 2025)
subclasses private parts of torch's DataLoader and predates torch 2.7.
"""

import atexit
import multiprocessing
import os
import re
import shutil
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from owl2.data.collate import Batch, Features
from owl2.data.mixture import (
    MixtureDataset,
    MixtureSampler,
    SampleIndex,
    State,
    make_generator,
)
from owl2.data.sample import InvalidSample, Sample
from owl2.errors import ErrorCode, InputError

# Batches whose samples are sorted by length together: enough for similar lengths within a batch,
# few enough that the order of an epoch stays random.
GROUPED_BATCHES = 50
CHARACTERS_PER_TOKEN = 4

# Ctrl-C and job schedulers send these to all processes of a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHARED_MEMORY = Path("/dev/shm")  # of Linux
MIN_SHARED_MEMORY = 2**20  # bytes

_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


class MixtureBatchSampler(Sampler[list[SampleIndex]]):
    """The endless batches of process `rank` of `world_size`, `batch_size` positions each.

    The batches of all processes together are those of one process with `batch_size * world_size`,
    except for streams, of which each process has its own share.

    Args:
        image_tokens: Group samples of similar length, counting this many tokens per image; None for
            no grouping.
        pairs: Append the `MixtureDataset.partner` of each position to each batch.

    Attributes:
        state: Iterating starts after this batch; see `states`. None starts at the first.
        states: The state after each batch that was yielded, oldest first, as JSON. The consumer
            removes them.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        image_tokens: int | None = None,
        pairs: bool = False,
    ) -> None:
        self.dataset = dataset
        self.pairs = pairs
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.image_tokens = image_tokens
        self.state: State | None = None
        self.states: deque[State] = deque()

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        state = self.state or {"sampler": None, "batches": 0}
        self.states.clear()
        sampler = MixtureSampler(self.dataset, self.rank, self.world_size, state["sampler"])
        start: int = state["batches"]
        while True:
            before = sampler.state()
            batches = self._next_batches(sampler)
            after = sampler.state()
            for i in range(start, len(batches)):
                is_last = i + 1 == len(batches)
                self.states.append(
                    {"sampler": after, "batches": 0}
                    if is_last
                    else {"sampler": before, "batches": i + 1}
                )
                partners = map(self.dataset.partner, batches[i]) if self.pairs else ()
                yield [*batches[i], *partners]
            start = 0

    def _next_batches(self, sampler: MixtureSampler) -> list[list[SampleIndex]]:
        size, world_size = self.batch_size, self.world_size
        if self.image_tokens is None:
            return [sampler.take(size * world_size)[self.rank :: world_size]]
        drawn = sampler.take(GROUPED_BATCHES * size * world_size)
        if None in self.dataset.sizes:  # the lengths of other processes' samples are unknown
            return self._group(drawn[self.rank :: world_size], size)
        return [batch[self.rank :: world_size] for batch in self._group(drawn, size * world_size)]

    def _group(self, drawn: Sequence[SampleIndex], size: int) -> list[list[SampleIndex]]:
        """Batches of samples of similar length, in random order."""
        lengths = torch.tensor(
            [estimated_length(self.dataset.sample(i), self.image_tokens or 0) for i in drawn]
        )
        batches = lengths.argsort(stable=True).split(size)
        generator = make_generator(self.dataset.seed, *drawn[0][:3], len(drawn))
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [[drawn[i] for i in batches[number].tolist()] for number in order]


def estimated_length(sample: Sample | InvalidSample, image_tokens: int) -> int:
    """Approximate number of tokens, from the characters and the images. No image is opened.

    0 for an invalid sample, which is reported when it is encoded.
    """
    characters = images = 0
    for message in sample.messages if isinstance(sample, Sample) else ():
        content = message["content"]
        if isinstance(content, str):
            characters += len(content)
            continue
        for part in content:
            characters += len(part.get("text", ""))
            images += part.get("type") != "text"
    return characters // CHARACTERS_PER_TOKEN + images * image_tokens


class MixtureDataLoader:
    """Endless batches.

    Args:
        sampler: The positions of each batch.
        collate: Features of a batch to the `Batch`.
        num_workers: Worker processes; 0 encodes in the main process.

    Attributes:
        state: The position after the batches returned so far, as JSON; None before the first. Set
            it before iterating to resume.
        wait_seconds: Time spent waiting for batches so far.
    """

    def __init__(
        self,
        sampler: MixtureBatchSampler,
        collate: Callable[[Sequence[Features | InvalidSample]], Batch],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = sampler
        self.dataset = sampler.dataset
        self.collate = collate
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.state: State | None = None
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.state = self.state
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # With its own generator the loader does not advance the global one, from which dropout
            # draws. A resumed run would otherwise differ from an uninterrupted one.
            generator=torch.Generator(),
        )
        batches = iter_ignoring_signals(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - start
            self.state = self.sampler.states.popleft()
            yield batch


def iter_ignoring_signals(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The batches of `loader`, whose workers ignore SIGINT and SIGTERM.

    The training process finishes its step first, and stops the workers then. The signals are
    blocked while the workers start: a worker would otherwise end if one arrived before
    `ignore_stop_signals` has run in it.

    Raises:
        InputError: A worker is killed, or the shared memory is too small.
    """
    loader.worker_init_fn = ignore_stop_signals
    loader.collate_fn = partial(_collate, loader.collate_fn)
    if loader.num_workers:
        require_shared_memory()
    others = multiprocessing.active_children()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _workers.update(set(multiprocessing.active_children()) - set(others))
    return _translate_errors(batches)


def _kill_workers(owner: int) -> None:
    """Kill the workers of iterators that still exist when the process `owner` exits.

    The traceback of an error in the training loop keeps its iterator. At exit, multiprocessing ends
    the workers with SIGTERM, which they ignore, and would wait for them forever.
    """
    if _workers and os.getpid() == owner:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error for killed workers
        for worker in _workers:
            worker.kill()


atexit.register(_kill_workers, os.getpid())


def require_shared_memory() -> None:
    """Raises `InputError` if the shared memory is too small for the semaphores of the workers."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < MIN_SHARED_MEMORY:
        raise _shared_memory_error(f"less than {MIN_SHARED_MEMORY / 2**20:.0f} MiB are free")


def _shared_memory_error(reason: str) -> InputError:
    return InputError(
        f"{SHARED_MEMORY} is too small for the processes that load the data: {reason}. Enlarge it "
        "(docker run --shm-size=8g or --ipc=host), use smaller batches, or load the data in the "
        "main process: dataloader_num_workers=0 in a recipe, --workers 1 for `owl2 data check`.",
        ErrorCode.OUT_OF_MEMORY,
    )


def _collate(collate: Callable[[Any], Any], features: Any) -> Any:
    """The batch; in a worker its tensors are moved to shared memory.

    The queue of a worker would do that as well, but after an error it prints a traceback and drops
    the batch, for which the main process would wait forever.
    """
    batch = collate(features)
    if get_worker_info() is not None and isinstance(batch, Batch):
        for tensor in batch.inputs.values():
            tensor.share_memory_()
    return batch


def _translate_errors(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except RuntimeError as error:
        message = str(error)
        reason = message.strip().rpartition("\n")[2].rstrip(".")
        if "DataLoader worker" not in message:  # part of torch's messages about workers
            raise
        if re.search("shared memory|</torch_", message):  # the name of a file in it
            raise _shared_memory_error(reason) from error
        if not re.search("killed by signal|exited unexpectedly", message):
            raise
        raise InputError(
            f"a process that loads the data was killed: {reason}. If memory was short, use fewer "
            "processes: dataloader_num_workers in a recipe, --workers for `owl2 data check`.",
            ErrorCode.PROCESS_FAILED,
        ) from error


def ignore_stop_signals(worker: int) -> None:
    """Ignores `STOP_SIGNALS` in a worker process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
