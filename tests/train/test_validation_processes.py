"""Validation by two processes gives the results of one."""

import json

import pytest

from owl2.train.run import train
from tests.train.processes import FSDP, run
from tests.train.runs import quiet, read_jsonl
from tests.train.tiny import write_rows

HELD_OUT = 7  # one of two processes has one more sample


@pytest.fixture
def validated(recipe, world, tmp_path):
    """A recipe with held-out samples with and without images, in turn, one kind per process."""
    path = tmp_path / "held_out.json"
    answers = ["red " * (number + 1) for number in range(HELD_OUT)]
    write_rows(path, answers, lambda n: world / f"{n}.png" if n % 2 else None)
    held_out = {"data": [{"file": str(path), "images": "/"}], "eval_steps": 2, "num_generations": 1}

    settings = {"validation": held_out, "max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    return lambda name: recipe(output=str(tmp_path / name), **settings)


def read(folder, name):
    return read_jsonl(folder / name)


@pytest.mark.parametrize(
    "environment",
    [pytest.param({}, id="DDP"), pytest.param(FSDP, id="FSDP2", marks=pytest.mark.slow)],
)
def test_two_processes_give_the_results_of_one(validated, tmp_path, environment):
    single = train(validated("one"), quiet()).output
    run(tmp_path / "output", train, validated("two"), count=2, environment=environment)
    together = tmp_path / "two"

    one, two = read(single, "validation.jsonl"), read(together, "validation.jsonl")
    assert [line["step"] for line in two] == [0, 2]
    for expected, found in zip(one, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        same = ("step", "tokens", "samples", "num_skipped")
        assert [found[key] for key in same] == [expected[key] for key in same]
        assert found["samples"] == HELD_OUT
    assert two[0]["generations"] == one[0]["generations"]

    for expected, found in zip(read(single, "log.jsonl"), read(together, "log.jsonl"), strict=True):
        same = ("step", "samples", "tokens", "images", "num_skipped")
        assert [found[key] for key in same] == [expected[key] for key in same]
    results = json.loads((together / "run.json").read_text(encoding="utf-8"))
    by_rank = results["peak_memory_bytes"]["process_by_rank"]
    assert len(by_rank) == results["processes"] == 2
    assert results["peak_memory_bytes"]["process"] == max(by_rank) and min(by_rank) > 10_000_000
