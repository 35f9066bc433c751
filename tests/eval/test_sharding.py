"""Which process of how many."""

import pytest

from owl2.errors import InputError
from owl2.eval.sharding import Team


def test_as_the_environment_says():
    assert Team.of({}) == Team(0, 1, 0)
    assert Team.of({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Team(3, 8, 1)
    assert Team.of({"RANK": "1", "WORLD_SIZE": "2"}).local_rank == 1


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}])
def test_what_does_not_fit(wrong):
    with pytest.raises(InputError, match=r"RANK|number"):
        Team.of(wrong)


def test_shares_are_all_of_it_and_no_more():
    items = list(range(11))
    shares = [Team(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert {len(share) for share in shares} == {3, 4}
    assert Team().share(items) == items
    assert [Team(1, 3).whose(place) for place in (0, 4, 11)] == [0, 1, 2]
    assert all(Team(0, 3).whose(item) == rank for rank in range(3) for item in shares[rank])
