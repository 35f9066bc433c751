import json
import pickle
from collections import Counter
from itertools import groupby

import pytest

from owl2.data.mixture import Mixture, MixtureSource, permuted
from owl2.data.sample import Sample
from owl2.errors import InputError
from tests.data.streams import Numbered


def samples(name: str, count: int) -> list[Sample]:
    return [Sample([], f"{name}{number}") for number in range(count)]


def taken(mixture: Mixture, draws, count: int) -> list[str]:
    return [mixture[draw].source for draw in draws.take(count)]


def epochs(mixture: Mixture, count: int) -> list[list[str]]:
    draws = mixture.draws()
    return [taken(mixture, draws, mixture.epoch_size) for _ in range(count)]


# ------------------------------------------------------------------ what is drawn


def test_without_a_count_every_sample_once_an_epoch():
    mixture = Mixture([MixtureSource(samples("a", 30)), MixtureSource(samples("b", 20))])
    everything = [f"a{number}" for number in range(30)] + [f"b{number}" for number in range(20)]
    drawn = epochs(mixture, 3)
    assert [sorted(epoch) for epoch in drawn] == [sorted(everything)] * 3
    assert len({tuple(epoch) for epoch in drawn}) == 3


def test_a_count_draws_anew_each_epoch_without_repetition():
    drawn = epochs(
        Mixture([MixtureSource(samples("a", 100), 10), MixtureSource(samples("b", 5))]), 4
    )
    for epoch in drawn:
        assert len(epoch) == len(set(epoch)) == 15
        assert sum(name.startswith("b") for name in epoch) == 5
    assert len({tuple(sorted(epoch)) for epoch in drawn}) == 4


def test_a_count_above_the_size_repeats_evenly():
    for epoch in epochs(Mixture([MixtureSource(samples("a", 4), 10)]), 5):
        assert sorted(Counter(epoch).values()) == [2, 2, 3, 3]


def test_sources_are_spread_over_the_epoch():
    (epoch,) = epochs(
        Mixture([MixtureSource(samples("a", 300)), MixtureSource(samples("b", 100))]), 1
    )
    for start in range(0, 400, 100):
        assert 10 <= sum(name[0] == "b" for name in epoch[start : start + 100]) <= 40
    assert max(len(list(run)) for _, run in groupby(name[0] for name in epoch)) < 40


def test_weights_are_shares_without_an_end():
    sources = [
        MixtureSource(samples("a", 10), weight=3.0),
        MixtureSource(samples("b", 1000), weight=0.5),
    ]
    mixture = Mixture(sources, seed=4)
    assert mixture.epoch_size is None
    drawn = taken(mixture, mixture.draws(), 3500)
    assert 2900 < sum(name[0] == "a" for name in drawn) < 3100
    of_a = [name for name in drawn if name[0] == "a"]
    for start in range(0, 100, 10):  # each once before one comes again, in another order
        assert len(set(of_a[start : start + 10])) == 10
    assert of_a[:10] != of_a[10:20]


def test_the_order_depends_on_the_seed():
    sources = [MixtureSource(samples("a", 50), 9), MixtureSource(samples("b", 50), 9)]
    one, same, other = (epochs(Mixture(sources, seed), 2) for seed in (1, 1, 2))
    assert one == same
    assert one[0] != other[0]
    places = [[name[1:] for name in one[0] if name[0] == letter] for letter in "ab"]
    assert places[0] != places[1]


def test_the_order_is_what_it_always_was():
    """Or a run that was stopped would go on with other samples under a newer version."""
    mixture = Mixture([MixtureSource(samples("a", 5)), MixtureSource(samples("b", 100), 3)], seed=7)
    assert taken(mixture, mixture.draws(), 10) == EXPECTED


EXPECTED = ["a1", "a0", "a2", "b70", "a3", "a4", "b34", "b0", "a1", "a3"]


def test_millions_take_no_room():
    mixture = Mixture([MixtureSource(range(10**12)), MixtureSource(range(10**9), 5)])
    assert len(pickle.dumps(mixture)) < 1000
    assert len({mixture[draw] for draw in mixture.draws().take(1000)}) == 1000


# ------------------------------------------------------------------ processes and states


def test_processes_share_one_order():
    mixture = Mixture([MixtureSource(samples("a", 50)), MixtureSource(samples("b", 40), 13)])
    whole = taken(mixture, mixture.draws(), 240)
    for rank in range(3):
        draws = mixture.draws(rank, 3)
        parts = [draws.take(12) for _ in range(20)]
        own = [mixture[draw].source for part in parts for draw in part[rank::3]]
        assert own == whole[rank::3]


def with_streams(**settings) -> Mixture:
    sources = [
        MixtureSource(samples("a", 20), **{key: value[0] for key, value in settings.items()}),
        MixtureSource(Numbered("s"), **{key: value[1] for key, value in settings.items()}),
        MixtureSource(Numbered("t"), **{key: value[2] for key, value in settings.items()}),
    ]
    return Mixture(sources, seed=3, window=7)


@pytest.mark.parametrize("settings", [{"count": (9, 15, 4)}, {"weight": (0.2, 1.5, 0.3)}])
@pytest.mark.parametrize("stop", [0, 1, 27, 28, 29, 60])
def test_a_state_is_gone_on_from(settings, stop):
    mixture = with_streams(**settings)
    whole = taken(mixture, mixture.draws(), 100)
    draws = mixture.draws()
    before = taken(mixture, draws, stop)
    state = json.loads(json.dumps(draws.state()))
    taken(mixture, draws, 5)  # does not change the state that was taken
    again = with_streams(**settings)
    assert before + taken(again, again.draws(state=state), 100 - stop) == whole


def test_streams_give_each_process_its_share():
    mixture = with_streams(count=(9, 15, 4))
    seen = []
    for rank in range(2):
        draws = mixture.draws(rank, 2)
        own = [draw for _ in range(28) for draw in draws.take(2)[rank::2]]
        seen.append([mixture[draw].source for draw in own])
    for rank, names in enumerate(seen):
        numbers = [int(name[1:]) for name in names if name[0] == "s"]
        assert numbers == list(range(rank, 2 * len(numbers), 2))
    per_epoch = Counter(name[0] for name in seen[0] + seen[1])
    assert per_epoch == {"a": 18, "s": 30, "t": 8}  # two epochs
    assert mixture.sources[1].samples.asked == [(3, 7, 0, 2, None), (3, 7, 1, 2, None)]


# ------------------------------------------------------------------ permutations


@pytest.mark.parametrize("size", [*range(1, 20), 1000])
def test_permuted_is_a_permutation(size):
    for key in range(5):
        assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


def test_permutations_are_equally_likely():
    count = Counter(tuple(permuted(place, 3, key) for place in range(3)) for key in range(6000))
    assert len(count) == 6
    assert all(850 < number < 1150 for number in count.values())  # 5 standard deviations
    ends = Counter(permuted(0, 10, key) for key in range(10_000))
    assert all(850 < ends[place] < 1150 for place in range(10))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([], "nothing to train on"),
        ([MixtureSource(samples("a", 1)), MixtureSource([])], "MixtureSource 1 .* no samples"),
        ([MixtureSource([], name="talks.json")], "talks.json has no samples"),
        ([MixtureSource(samples("a", 1), 0)], "count is 0"),
        ([MixtureSource(samples("a", 1), weight=0.0)], "weight is 0.0"),
        (
            [MixtureSource(samples("a", 1), weight=1.0), MixtureSource(samples("b", 1))],
            "a weight, or none",
        ),
        (
            [MixtureSource(Numbered("s"), name="cc3m")],
            "cc3m is read as a stream.*`count`.*`weight`",
        ),
    ],
)
def test_nothing_to_draw_from(sources, complaint):
    with pytest.raises(InputError, match=complaint):
        Mixture(sources)


def test_a_stream_that_ends_is_named():
    class Empty(Numbered):
        def stream(self, **_):
            return iter(())

    draws = Mixture([MixtureSource(Empty("s"), 5, name="cc3m")]).draws()
    with pytest.raises(InputError, match="cc3m has no samples"):
        draws.take(1)
