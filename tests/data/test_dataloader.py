"""Batches: resume, processes, grouping by length, workers, signals."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from itertools import chain, islice

import pytest
import torch

from owl2.data import dataloader
from owl2.data.collate import Batch, Collator
from owl2.data.dataloader import (
    GROUPED_BATCHES,
    STOP_SIGNALS,
    MixtureBatchSampler,
    MixtureDataLoader,
    estimated_length,
    iter_ignoring_signals,
)
from owl2.data.mixture import MixtureDataset, MixtureSource
from owl2.data.sample import InvalidSample, Sample
from owl2.errors import ErrorCode
from tests.data.streams import NumberedStream
from tests.errors import raises_input_error

TEXT = "what color is the circle? yes no blue "


def sample(number: int, *images) -> Sample:
    content = [{"type": "image", "path": str(path)} for path in images]
    text = f"{number}? " + TEXT * (random.Random(number).randrange(12))
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return Sample(messages, f"row {number}")


def mixture(with_stream: bool = False, seed: int = 0) -> MixtureDataset:
    sources = [MixtureSource([sample(i) for i in range(90)]), MixtureSource([sample(1000)], 3)]
    if with_stream:
        sources.append(MixtureSource(NumberedStream("s"), 30))
    return MixtureDataset(sources, None, seed=seed)


def take(sampler: MixtureBatchSampler, count: int) -> list[list[str]]:
    """The sources of the samples of the next batches."""
    batches = islice(sampler, count)
    return [[sampler.dataset.sample(index).source for index in batch] for batch in batches]


# ------------------------------------------------------------------ batches of positions


@pytest.mark.parametrize("image_tokens", [None, 5])
@pytest.mark.parametrize("with_stream", [False, True])
@pytest.mark.parametrize("stop", [1, GROUPED_BATCHES - 1, GROUPED_BATCHES, GROUPED_BATCHES + 3])
def test_batches_resume_after_any_batch(image_tokens, with_stream, stop):
    sampler = MixtureBatchSampler(mixture(with_stream, 1), 4, image_tokens=image_tokens)
    batches = take(sampler, 120)
    state = json.loads(json.dumps(sampler.states[stop - 1]))
    resumed = MixtureBatchSampler(mixture(with_stream, 1), 4, image_tokens=image_tokens)
    resumed.state = state
    assert take(resumed, 120 - stop) == batches[stop:]


@pytest.mark.parametrize("image_tokens", [None, 5])
def test_batches_of_all_processes_are_those_of_one(image_tokens):
    expected = take(MixtureBatchSampler(mixture(), 6, image_tokens=image_tokens), 110)
    shares = [
        take(
            MixtureBatchSampler(mixture(), 2, rank=rank, world_size=3, image_tokens=image_tokens),
            110,
        )
        for rank in range(3)
    ]
    for number, batch in enumerate(expected):
        assert sorted(batch) == sorted(chain(*(share[number] for share in shares)))


def test_grouping_by_length_keeps_the_samples():
    dataset = mixture()
    plain = take(MixtureBatchSampler(dataset, 4), GROUPED_BATCHES)
    batches = list(islice(MixtureBatchSampler(dataset, 4, image_tokens=5), GROUPED_BATCHES))
    grouped = [[dataset.sample(index) for index in batch] for batch in batches]
    assert sorted(chain(*plain)) == sorted(s.source for batch in grouped for s in batch)
    lengths = [[estimated_length(s, 5) for s in batch] for batch in grouped]
    assert sum(max(batch) - min(batch) for batch in lengths) < 2 * 120  # twice the total range
    firsts = [batch[0] for batch in lengths]
    assert firsts != sorted(firsts)  # the order of the batches is random


def test_each_process_groups_its_share_of_a_stream():
    for rank in range(2):
        sampler = MixtureBatchSampler(mixture(True), 4, rank=rank, world_size=2, image_tokens=5)
        batches = take(sampler, GROUPED_BATCHES)
        assert {len(batch) for batch in batches} == {4}
        shares = {int(name[1:]) % 2 for batch in batches for name in batch if name[0] == "s"}
        assert shares == {rank}


def test_estimated_length_counts_texts_and_images_of_all_turns():
    parts = [{"type": "image", "path": "a"}, {"type": "text", "text": "x" * 40}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "y" * 20}]
    assert estimated_length(Sample(messages, ""), image_tokens=65) == 2 * 65 + 15


def test_invalid_samples_are_grouped_as_well():
    class InvalidFirst(NumberedStream):
        def stream(self, **arguments):
            yield from ((InvalidSample("s", "reason"), {}) for _ in range(3))
            yield from super().stream(**arguments)

    dataset = MixtureDataset([MixtureSource(InvalidFirst("s"), 30)], None)
    batches = islice(MixtureBatchSampler(dataset, 4, image_tokens=5), 50)
    samples = [dataset.sample(index) for batch in batches for index in batch]
    assert sum(isinstance(sample, InvalidSample) for sample in samples) == 3


# ------------------------------------------------------------------ the data loader


def loader(image, processor, num_workers: int = 0, image_tokens=None) -> MixtureDataLoader:
    rows = [sample(number, *[image] * (number % 2)) for number in range(24)]
    dataset = MixtureDataset(
        [MixtureSource(rows), MixtureSource(NumberedStream("s"), 8)],
        processor,
        seed=3,
        augment="dihedral",
        max_length=70,
    )
    sampler = MixtureBatchSampler(dataset, 4, image_tokens=image_tokens)
    return MixtureDataLoader(sampler, Collator(processor), num_workers=num_workers)


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
        assert one[1:] == other[1:]


@pytest.mark.parametrize("image_tokens", [None, 5])
def test_workers_do_not_change_batches_and_the_state_is_that_of_returned_batches(
    image, processor, image_tokens
):
    options = {"image_tokens": image_tokens}
    expected = list(islice(loader(image, processor, **options), 24))
    with_workers = loader(image, processor, 2, **options)
    batches = iter(with_workers)
    first = list(islice(batches, 5))
    state = json.loads(json.dumps(with_workers.state))  # the workers are some batches ahead
    assert_same(expected[:5], first)
    del batches
    resumed = loader(image, processor, 2, **options)
    resumed.state = state
    assert_same(expected[5:], islice(resumed, 19))
    assert sum(batch.skipped != [] for batch in expected) > 0  # truncated to no label


def test_the_global_generator_is_not_used(image, processor):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(loader(image, processor)))
    assert torch.equal(torch.rand(3), expected)


def test_waiting_time_is_measured(image, processor):
    batches = loader(image, processor)
    assert batches.wait_seconds == 0
    list(islice(batches, 3))
    assert 0 < batches.wait_seconds < 10


def test_workers_ignore_signals_from_their_start(image, processor, monkeypatch):
    ignore = dataloader.ignore_stop_signals

    def signaled_at_start(worker: int) -> None:
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        ignore(worker)

    monkeypatch.setattr(dataloader, "ignore_stop_signals", signaled_at_start)
    assert len(list(islice(loader(image, processor, num_workers=1), 2))) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_dataset_and_collator_can_be_pickled_for_spawned_workers(image, processor):
    original = loader(image, processor)
    dataset, collate = pickle.loads(pickle.dumps((original.dataset, original.collate)))
    (index,) = next(iter(MixtureBatchSampler(original.dataset, 1)))
    expected = original.collate([original.dataset[index]])
    assert_same([expected], [collate([dataset[index]])])


class LargeBatches(torch.utils.data.Dataset):
    """Samples of 4 MB in a process that can write files of 1 MB, also into shared memory."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        return torch.zeros(2**20)


def as_batch(rows: list[torch.Tensor]) -> Batch:
    return Batch({"pixel_values": torch.stack(rows)}, len(rows), 0, 0, [])


def test_a_batch_that_exceeds_the_shared_memory_ends_with_advice():
    loader = torch.utils.data.DataLoader(LargeBatches(), 2, num_workers=1, collate_fn=as_batch)
    with raises_input_error(ErrorCode.OUT_OF_MEMORY, "/dev/shm", "--shm-size"):
        list(iter_ignoring_signals(loader))


ERROR_IN_LOOP = """
import torch
from owl2.data.dataloader import iter_ignoring_signals
for batch in iter_ignoring_signals(torch.utils.data.DataLoader([1.0] * 99, num_workers=2)):
    raise KeyError("in the training loop")
"""


def test_a_process_exits_after_an_error_while_workers_run():
    done = subprocess.run(
        [sys.executable, "-c", ERROR_IN_LOOP], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("KeyError: 'in the training loop'")


def test_a_tiny_shared_memory_is_refused_before_workers_start(monkeypatch, tmp_path):
    monkeypatch.setattr(dataloader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(dataloader, "MIN_SHARED_MEMORY", 2**60)
    with raises_input_error(ErrorCode.OUT_OF_MEMORY, tmp_path, "dataloader_num_workers=0"):
        iter_ignoring_signals(torch.utils.data.DataLoader([1, 2], num_workers=1))
    assert len(list(iter_ignoring_signals(torch.utils.data.DataLoader([1, 2])))) == 2


class KilledDataset(torch.utils.data.Dataset):
    """Its process is killed when it reads a sample, as by the system for lack of memory."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_with_advice():
    with raises_input_error(ErrorCode.PROCESS_FAILED, "dataloader_num_workers"):
        list(iter_ignoring_signals(torch.utils.data.DataLoader(KilledDataset(), num_workers=1)))
