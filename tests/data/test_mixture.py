from collections import Counter

import pytest

from owl2.data.mixture import Mixture, Source
from owl2.data.sample import Sample
from owl2.errors import InputError


def samples(name: str, count: int) -> list[Sample]:
    return [Sample([], f"{name}{number}") for number in range(count)]


def epoch(mixture: Mixture, number: int) -> list[str]:
    mixture.set_epoch(number)
    return [mixture[index].source for index in range(len(mixture))]


def test_without_a_count_every_sample_once():
    mixture = Mixture([Source(samples("a", 3)), Source(samples("b", 2))])
    for number in range(3):
        assert epoch(mixture, number) == ["a0", "a1", "a2", "b0", "b1"]


def test_a_count_draws_anew_each_epoch_without_repetition():
    mixture = Mixture([Source(samples("a", 100), 10), Source(samples("b", 5))])
    epochs = [epoch(mixture, number) for number in range(4)]
    for drawn in epochs:
        assert len(drawn) == 15
        assert len(set(drawn)) == 15
        assert drawn[10:] == ["b0", "b1", "b2", "b3", "b4"]
    assert len({tuple(sorted(drawn)) for drawn in epochs}) == 4


def test_a_count_above_the_size_repeats_evenly():
    drawn = Counter(epoch(Mixture([Source(samples("a", 4), 10)]), 0))
    assert sorted(drawn.values()) == [2, 2, 3, 3]


def test_the_draw_depends_on_seed_epoch_and_place_only():
    def make(seed: int) -> Mixture:
        return Mixture([Source(samples("a", 50), 9), Source(samples("b", 50), 9)], seed)

    straight = [epoch(make(1), number) for number in range(3)]
    walked = make(1)
    assert [epoch(walked, number) for number in (0, 1, 2, 1)] == [*straight, straight[1]]
    assert epoch(make(2), 0) != straight[0]
    first, second = straight[0][:9], straight[0][9:]
    assert [name[1:] for name in first] != [name[1:] for name in second]


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([], "nothing to train on"),
        ([Source(samples("a", 1)), Source([])], "Source 1 .* no samples"),
        ([Source(samples("a", 1), 0)], "count is 0"),
    ],
)
def test_nothing_to_draw_from(sources, complaint):
    with pytest.raises(InputError, match=complaint):
        Mixture(sources)
