"""The order of a mixture: every sample once per epoch, the same for all processes, exact resume."""

import json
from collections import Counter

import pytest

from owl2.data.mixture import MixtureDataset, MixtureSampler, MixtureSource, make_generator
from owl2.data.sample import Sample
from owl2.errors import ErrorCode
from tests.data.streams import NumberedStream
from tests.errors import raises_input_error


def samples(name: str, count: int) -> list[Sample]:
    return [Sample([], f"{name}{number}") for number in range(count)]


def mixture(*sources: MixtureSource, seed: int = 0, shuffle_buffer: int = 1000) -> MixtureDataset:
    return MixtureDataset(sources, None, seed=seed, shuffle_buffer=shuffle_buffer)


def take(sampler: MixtureSampler, count: int) -> list[str]:
    return [sampler.dataset.sample(index).source for index in sampler.take(count)]


def epochs(dataset: MixtureDataset, count: int) -> list[list[str]]:
    sampler = MixtureSampler(dataset)
    return [take(sampler, dataset.epoch_size) for _ in range(count)]


# ------------------------------------------------------------------ order


def test_every_sample_occurs_once_per_epoch():
    drawn = epochs(mixture(MixtureSource(samples("a", 30)), MixtureSource(samples("b", 20))), 3)
    expected = [f"a{number}" for number in range(30)] + [f"b{number}" for number in range(20)]
    assert [sorted(epoch) for epoch in drawn] == [sorted(expected)] * 3
    assert len({tuple(epoch) for epoch in drawn}) == 3


def test_a_count_below_the_size_selects_other_samples_in_each_epoch():
    drawn = epochs(mixture(MixtureSource(samples("a", 100), 10), MixtureSource(samples("b", 5))), 4)
    for epoch in drawn:
        assert len(epoch) == len(set(epoch)) == 15
        assert sum(name.startswith("b") for name in epoch) == 5
    assert len({tuple(sorted(epoch)) for epoch in drawn}) == 4


def test_a_count_above_the_size_repeats_samples_evenly():
    for epoch in epochs(mixture(MixtureSource(samples("a", 4), 10)), 5):
        assert sorted(Counter(epoch).values()) == [2, 2, 3, 3]


def test_sources_are_spread_over_the_epoch():
    (epoch,) = epochs(
        mixture(MixtureSource(samples("a", 300)), MixtureSource(samples("b", 100))), 1
    )
    for start in range(0, 400, 100):
        assert 10 <= sum(name[0] == "b" for name in epoch[start : start + 100]) <= 40


def test_weights_are_shares_without_epochs():
    dataset = mixture(
        MixtureSource(samples("a", 10), weight=3.0),
        MixtureSource(samples("b", 1000), weight=0.5),
        seed=4,
    )
    assert dataset.epoch_size is None
    drawn = take(MixtureSampler(dataset), 3500)
    assert 2900 < sum(name[0] == "a" for name in drawn) < 3100
    of_a = [name for name in drawn if name[0] == "a"]
    for start in range(0, 100, 10):  # a permutation of all samples before any is repeated
        assert len(set(of_a[start : start + 10])) == 10
    assert of_a[:10] != of_a[10:20]


def test_weights_hold_beyond_a_block(monkeypatch):
    monkeypatch.setattr("owl2.data.mixture.BLOCK_SIZE", 7)
    dataset = mixture(
        MixtureSource(samples("a", 5), weight=1.0), MixtureSource(samples("b", 5), weight=1.0)
    )
    drawn = take(MixtureSampler(dataset), 70)
    of_a = [name for name in drawn if name[0] == "a"]
    assert all(len(set(of_a[i : i + 5])) == 5 for i in range(0, len(of_a) // 5 * 5, 5))
    assert len({tuple(name[0] for name in drawn[i : i + 7]) for i in range(0, 70, 7)}) > 3


def test_the_order_depends_on_the_seed():
    sources = [MixtureSource(samples("a", 50), 9), MixtureSource(samples("b", 50), 9)]
    one, same, other = (epochs(mixture(*sources, seed=seed), 2) for seed in (1, 1, 2))
    assert one == same
    assert one[0] != other[0]
    rows = [[name[1:] for name in one[0] if name[0] == letter] for letter in "ab"]
    assert rows[0] != rows[1]


def test_generators_depend_on_the_key_only():
    seeds = [make_generator(*key).initial_seed() for key in ((0, 1), (0, 1), (1, 0), (0, 1, 0))]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


# ------------------------------------------------------------------ processes and states


def test_all_processes_have_the_same_order():
    dataset = mixture(MixtureSource(samples("a", 50)), MixtureSource(samples("b", 40), 13))
    expected = take(MixtureSampler(dataset), 240)
    for rank in range(3):
        sampler = MixtureSampler(dataset, rank, 3)
        own = [index for _ in range(20) for index in sampler.take(12)[rank::3]]
        assert [dataset.sample(index).source for index in own] == expected[rank::3]


def with_streams(**settings) -> MixtureDataset:
    return mixture(
        *(
            MixtureSource(source, **{key: values[i] for key, values in settings.items()})
            for i, source in enumerate((samples("a", 20), NumberedStream("s"), NumberedStream("t")))
        ),
        seed=3,
        shuffle_buffer=7,
    )


@pytest.mark.parametrize("settings", [{"count": (9, 15, 4)}, {"weight": (0.2, 1.5, 0.3)}])
@pytest.mark.parametrize("stop", [0, 1, 27, 28, 29, 60])
def test_resumed_equals_uninterrupted(settings, stop):
    expected = take(MixtureSampler(with_streams(**settings)), 100)
    sampler = MixtureSampler(with_streams(**settings))
    before = take(sampler, stop)
    state = json.loads(json.dumps(sampler.state()))
    take(sampler, 5)  # does not change the saved state
    resumed = MixtureSampler(with_streams(**settings), state=state)
    assert before + take(resumed, 100 - stop) == expected


def test_each_process_reads_its_share_of_a_stream():
    dataset = with_streams(count=(9, 15, 4))
    names = []
    for rank in range(2):
        sampler = MixtureSampler(dataset, rank, 2)
        own = [index for _ in range(28) for index in sampler.take(2)[rank::2]]
        names.append([dataset.sample(index).source for index in own])
    for rank, own in enumerate(names):
        numbers = [int(name[1:]) for name in own if name[0] == "s"]
        assert numbers == list(range(rank, 2 * len(numbers), 2))
    per_epoch = Counter(name[0] for name in names[0] + names[1])
    assert per_epoch == {"a": 18, "s": 30, "t": 8}  # two epochs
    assert dataset.sources[1].samples.calls == [(3, 7, 0, 2, None), (3, 7, 1, 2, None)]


# ------------------------------------------------------------------ invalid mixtures


@pytest.mark.parametrize(
    ("sources", "code", "needle"),
    [
        ([], ErrorCode.EMPTY_DATASET, "data"),
        ([MixtureSource(samples("a", 1)), MixtureSource([])], ErrorCode.EMPTY_DATASET, "source 1"),
        ([MixtureSource([], name="chat.json")], ErrorCode.EMPTY_DATASET, "chat.json"),
        (
            [MixtureSource(samples("a", 1), weight=1.0), MixtureSource(samples("b", 1))],
            ErrorCode.CONFLICT,
            "weight",
        ),
        ([MixtureSource(NumberedStream("s"), name="cc3m")], ErrorCode.MISSING_VALUE, "cc3m"),
        ([MixtureSource(samples("a", 1), count=0)], ErrorCode.INVALID_VALUE, "count=0"),
        ([MixtureSource(samples("a", 1), weight=0.0)], ErrorCode.INVALID_VALUE, "weight=0.0"),
        ([MixtureSource(samples("a", 1), weight=-1.0)], ErrorCode.INVALID_VALUE, "weight=-1.0"),
        (
            [MixtureSource(samples("a", 1), weight=float("nan"), name="b")],
            ErrorCode.INVALID_VALUE,
            "b: weight",
        ),
    ],
)
def test_invalid_sources_are_refused(sources, code, needle):
    with raises_input_error(code, needle):
        mixture(*sources)


def test_shuffle_buffer_below_one_is_refused():
    with raises_input_error(ErrorCode.INVALID_VALUE, "shuffle_buffer=0"):
        mixture(MixtureSource(samples("a", 1)), shuffle_buffer=0)
