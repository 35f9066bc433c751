import json
import pickle
import random
import signal
import threading
import time
from itertools import chain, islice

import psutil
import pytest
import torch

from owl2.data.collate import Collator, TrainingSet
from owl2.data.dataloader import (
    GROUPED,
    STOPS,
    MixtureDataLoader,
    _leave_stopping_to_others,
    batches_of,
    estimated_length,
)
from owl2.data.mixture import Mixture, MixtureSource
from owl2.data.sample import InvalidSample, Sample
from tests.data.streams import Numbered

WORDS = "what color is the circle? yes no blue "


def sample(number: int, *images) -> Sample:
    content = [{"type": "image", "path": str(path)} for path in images]
    text = f"{number}? " + WORDS * (random.Random(number).randrange(12))
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return Sample(messages, f"row {number}")


def mixture(streams: bool = False, **settings) -> Mixture:
    sources = [
        MixtureSource([sample(number) for number in range(90)]),
        MixtureSource([sample(1000)], 3),
    ]
    if streams:
        sources.append(MixtureSource(Numbered("s"), 30))
    return Mixture(sources, **settings)


def names(made: Mixture, batches) -> list[list[str]]:
    return [[made[draw].source for draw in draws] for draws, _ in batches]


# ------------------------------------------------------------------ the plan of batches


@pytest.mark.parametrize("image_tokens", [None, 5])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stop", [1, GROUPED - 1, GROUPED, GROUPED + 3])
def test_a_plan_is_gone_on_with_after_any_batch(image_tokens, streams, stop):
    made = mixture(streams, seed=1)
    plan = list(islice(batches_of(made, 4, image_tokens=image_tokens), 120))
    state = json.loads(json.dumps(plan[stop - 1][1]))
    fresh = mixture(streams, seed=1)
    rest = islice(batches_of(fresh, 4, image_tokens=image_tokens, state=state), 120 - stop)
    assert names(fresh, rest) == names(made, plan[stop:])


@pytest.mark.parametrize("image_tokens", [None, 5])
def test_processes_together_have_the_batches_of_one(image_tokens):
    made = mixture()
    whole = names(made, islice(batches_of(made, 6, image_tokens=image_tokens), 110))
    parts = [
        names(
            made,
            islice(batches_of(made, 2, rank=rank, world=3, image_tokens=image_tokens), 110),
        )
        for rank in range(3)
    ]
    for number, batch in enumerate(whole):
        assert sorted(batch) == sorted(chain(*(part[number] for part in parts)))


def test_grouping_changes_who_comes_together_only():
    made = mixture()
    plain = names(made, islice(batches_of(made, 4), GROUPED))
    plan = list(islice(batches_of(made, 4, image_tokens=5), GROUPED))
    grouped = names(made, plan)
    assert sorted(chain(*plain)) == sorted(chain(*grouped))
    lengths = [[estimated_length(made[draw], 5) for draw in draws] for draws, _ in plan]
    assert sum(max(batch) - min(batch) for batch in lengths) < 2 * 120  # the range of all, twice
    firsts = [batch[0] for batch in lengths]
    assert firsts != sorted(firsts)  # but batches come as chance has it


def test_each_process_groups_its_own_share_of_a_stream():
    for rank in range(2):
        made = mixture(True)
        plan = list(islice(batches_of(made, 4, rank=rank, world=2, image_tokens=5), GROUPED))
        seen = names(made, plan)
        assert {len(batch) for batch in seen} == {4}
        streamed = {int(name[1:]) % 2 for batch in seen for name in batch if name[0] == "s"}
        assert streamed == {rank}


def test_the_estimate_counts_text_and_images_of_all_turns():
    parts = [{"type": "image", "path": "a"}, {"type": "text", "text": "x" * 40}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "y" * 20}]
    assert estimated_length(Sample(messages, ""), image_tokens=65) == 2 * 65 + 15


def test_a_row_that_is_no_sample_does_not_stop_the_grouping():
    stream = [InvalidSample("s", "why")] * 3

    class Broken(Numbered):
        def stream(self, **given):
            yield from ((bad, {}) for bad in stream)
            yield from super().stream(**given)

    made = Mixture([MixtureSource(Broken("s"), 30)])
    drawn = [draw for draws, _ in islice(batches_of(made, 4, image_tokens=5), 50) for draw in draws]
    assert sum(isinstance(draw.sample, InvalidSample) for draw in drawn) == 3


# ------------------------------------------------------------------ the loader


def loader(made: Mixture, processor, workers: int = 0, **settings) -> MixtureDataLoader:
    dataset = TrainingSet(made, processor, augment="dihedral", max_length=70, seed=3)
    return MixtureDataLoader(dataset, made, Collator(processor), 4, workers=workers, **settings)


def with_images(image) -> Mixture:
    rows = [sample(number, *[image] * (number % 2)) for number in range(24)]
    return Mixture([MixtureSource(rows), MixtureSource(Numbered("s"), 8)], seed=3)


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.batch.keys() == other.batch.keys()
        assert all(torch.equal(one.batch[key], other.batch[key]) for key in one.batch)
        assert one[1:] == other[1:]


@pytest.mark.parametrize("image_tokens", [None, 5])
def test_workers_change_nothing_and_a_state_is_that_of_what_was_taken(
    image, processor, image_tokens
):
    settings = {"image_tokens": image_tokens}
    whole = list(islice(loader(with_images(image), processor, **settings), 24))
    worked = loader(with_images(image), processor, 2, **settings)
    batches = iter(worked)
    first = list(islice(batches, 5))
    state = json.loads(json.dumps(worked.state))  # while the workers are batches ahead
    assert_same(whole[:5], first)
    del batches
    again = loader(with_images(image), processor, 2, **settings)
    again.state = state
    assert_same(whole[5:], islice(again, 19))
    assert sum(collated.left_out != [] for collated in whole) > 0  # some are cut to nothing


def test_the_chance_of_the_process_is_left_alone(image, processor):
    made = loader(with_images(image), processor)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(made))
    assert torch.equal(torch.rand(3), expected)


def test_waiting_is_counted(processor, monkeypatch):
    made = loader(mixture(), processor)
    assert made.waited == 0
    list(islice(made, 3))
    assert 0 < made.waited < 10


def test_a_worker_that_has_just_begun_leaves_stopping_to_others(image, processor, monkeypatch):
    others = set(psutil.Process().children())

    def slowly(worker: int) -> None:
        time.sleep(1)
        _leave_stopping_to_others(worker)

    def stop_worker() -> None:
        while not (begun := set(psutil.Process().children()) - others):
            time.sleep(0.001)
        worker = begun.pop()
        for number in STOPS:
            worker.send_signal(number)

    monkeypatch.setattr("owl2.data.dataloader._leave_stopping_to_others", slowly)
    stopping = threading.Thread(target=stop_worker)
    stopping.start()
    batches = list(islice(loader(with_images(image), processor, workers=1), 2))
    stopping.join()
    assert len(batches) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPS)


def test_workers_that_are_no_copies_can_be_told_everything(image, processor):
    """On other systems, and by Python 3.14, workers begin with what pickle carries to them."""
    made = loader(with_images(image), processor)
    dataset, collate = pickle.loads(pickle.dumps((made.dataset, made.collate)))
    draws, _ = next(batches_of(with_images(image), 4))
    assert_same([collate([dataset[draw] for draw in draws])], islice(made, 1))
