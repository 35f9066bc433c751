"""The rank of a process: its items and its device."""

import itertools

import pytest

from owl2.errors import ErrorCode
from owl2.workers import WorkerRank
from tests.errors import raises_input_error


def test_rank_is_read_from_the_environment():
    assert WorkerRank.from_environment({}) == WorkerRank(0, 1, 0)
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert WorkerRank.from_environment(environment) == WorkerRank(3, 8, 1)
    assert WorkerRank.from_environment({"RANK": "1", "WORLD_SIZE": "2"}).local_rank == 1


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({"RANK": "x"}, ErrorCode.INVALID_TYPE),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ErrorCode.INVALID_VALUE),
        ({"RANK": "1"}, ErrorCode.INVALID_VALUE),
    ],
)
def test_invalid_rank_is_an_error(environment, code):
    with raises_input_error(code, environment["RANK"]):
        WorkerRank.from_environment(environment)


def test_shards_are_disjoint_and_complete():
    items = list(range(11))
    shards = [WorkerRank(rank, 3).shard(items) for rank in range(3)]
    assert sorted(itertools.chain(*shards)) == items
    assert {len(shard) for shard in shards} == {3, 4}
    assert WorkerRank().shard(items) == items


def test_each_process_has_its_own_gpu():
    assert WorkerRank(3, 4, 1).device("cuda") == "cuda:1"
    assert WorkerRank(3, 4, 1).device("cpu") == "cpu"
    assert WorkerRank(3, 4, 1).device("cuda:0") == "cuda:0"
    assert WorkerRank().device("cuda") == "cuda"
