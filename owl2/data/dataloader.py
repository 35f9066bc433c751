"""The order of samples → batches, by processes that work ahead, with a state that can be saved.

::

    Mixture.draws ──batches_of──► [Draw, ...] ──workers: TrainingSet, Collator──► Collated ──► run
                       │                                                                       ▲
                       └── the state after it ────────────── waits until the batch is taken ───┘

All that is chance happens in `batches_of`, in one process a device; the workers only work it off.
They are some batches ahead, so each batch's state is kept until it is taken: a saved state is that
of the batches trained on.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from owl2.data.collate import Collated, Features
from owl2.data.mixture import Draw, Mixture, permuted
from owl2.data.sample import Bad, Sample
from owl2.errors import InputError

# Batches that are sorted together by length: enough that lengths in a batch are close, few enough
# that a window is far from an epoch.
GROUPED = 50
CHARACTERS_A_TOKEN = 4


def batches_of(
    mixture: Mixture,
    size: int,
    *,
    rank: int = 0,
    world: int = 1,
    image_tokens: int | None = None,
    state: dict[str, Any] | None = None,
) -> Iterator[tuple[list[Draw], dict[str, Any]]]:
    """The batches of process `rank` of `world`, `size` draws each, and the state after each.

    Without an end. The batches of all processes together are those of one process with
    `size` x `world`, but for what streams give, of which each process has its own share.

    Args:
        image_tokens: group samples of about the same length, counting an image as so many tokens;
            None: as they come.
        state: go on after it, with the same `size` x `world`.
    """
    state = state or {"draws": None, "done": 0}
    draws = mixture.draws(rank, world, state["draws"])
    done: int = state["done"]
    window = 1 if image_tokens is None else GROUPED
    while True:
        before = draws.state()
        drawn = draws.take(window * size * world)
        if image_tokens is None:
            batches = [drawn[rank::world]]
        elif mixture.has_streams:  # nobody knows how long other processes' samples are
            batches = _grouped(mixture, drawn[rank::world], size, image_tokens, before)
        else:
            groups = _grouped(mixture, drawn, size * world, image_tokens, before)
            batches = [group[rank::world] for group in groups]
        for number in range(done, window):
            whole = number + 1 == window
            after = draws.state() if whole else before
            yield batches[number], {"draws": after, "done": 0 if whole else number + 1}
        done = 0


def _grouped(
    mixture: Mixture, drawn: Sequence[Draw], size: int, image_tokens: int, state: dict[str, Any]
) -> list[list[Draw]]:
    """Batches of neighbours in length, in an order by chance."""
    lengths = [_length(mixture, draw, image_tokens) for draw in drawn]
    places = sorted(range(len(drawn)), key=lambda place: (lengths[place], place))
    batches = [
        [drawn[place] for place in places[start : start + size]]
        for start in range(0, len(places), size)
    ]
    key = (mixture.seed, state["epoch"], state["place"])
    return [batches[permuted(number, len(batches), *key)] for number in range(len(batches))]


def _length(mixture: Mixture, draw: Draw, image_tokens: int) -> int:
    """About how many tokens a draw's sample has; 0 if it is none."""
    try:
        sample = mixture[draw]
    except InputError:
        return 0  # which is said where the sample is used
    return 0 if isinstance(sample, Bad) else estimated_length(sample, image_tokens)


def estimated_length(sample: Sample, image_tokens: int) -> int:
    """About how many tokens a sample has, from its characters and images; nothing is opened."""
    characters = images = 0
    for message in sample.messages:
        content = message["content"]
        if isinstance(content, str):
            characters += len(content)
            continue
        for part in content:
            characters += len(part.get("text", ""))
            images += part.get("type") != "text"
    return characters // CHARACTERS_A_TOKEN + images * image_tokens


class _Planned(Sampler[list[Draw]]):
    """`batches_of` as a DataLoader wants it; puts the state after each batch into `states`."""

    def __init__(
        self, plan: Iterator[tuple[list[Draw], dict[str, Any]]], states: deque[dict[str, Any]]
    ) -> None:
        self.plan = plan
        self.states = states

    def __iter__(self) -> Iterator[list[Draw]]:
        for draws, state in self.plan:
            self.states.append(state)
            yield draws


# Ctrl-C and job schedulers signal all processes of a job.
STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _stops_wait() -> Iterator[None]:
    """Signals that stop a run are delivered after this; what is forked here starts with them held.

    A worker would otherwise die of one that comes before `_leave_stopping_to_others` has run in it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_stopping_to_others(worker: int) -> None:
    # The process that trains wants to finish its step first, and ends its workers then.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def working_on(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The batches of `loader`, whose workers leave Ctrl-C and SIGTERM to this process."""
    loader.worker_init_fn = _leave_stopping_to_others
    with _stops_wait():
        return iter(loader)


class Loader:
    """Batches without an end.

    Attributes:
        state: where the batches taken so far end, for JSON; set it before iterating to go on.
        waited: seconds spent waiting for batches so far.
    """

    def __init__(
        self,
        dataset: Dataset[Features | Bad],
        mixture: Mixture,
        collate: Callable[[Sequence[Features | Bad]], Collated],
        size: int,
        *,
        rank: int = 0,
        world: int = 1,
        image_tokens: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`dataset` makes features of the draws of `mixture`; the rest as in `batches_of`."""
        self.dataset = dataset
        self.mixture = mixture
        self.collate = collate
        self._plan = partial(
            batches_of, mixture, size, rank=rank, world=world, image_tokens=image_tokens
        )
        self.workers = workers
        self.pin_memory = pin_memory
        self.state: dict[str, Any] | None = None
        self.waited = 0.0

    def __iter__(self) -> Iterator[Collated]:
        states: deque[dict[str, Any]] = deque()
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Planned(self._plan(state=self.state), states),
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            # Of its own, or it would draw from the chance that the model's dropout has, at the
            # start of each process: a resumed run would differ from an uninterrupted one.
            generator=torch.Generator(),
        )
        batches = working_on(loader)
        while True:
            began = time.perf_counter()
            collated = next(batches)
            self.waited += time.perf_counter() - began
            self.state = states.popleft()
            yield collated
