"""Two processes train an adapter: they save the same adapter as one, and resume."""

import os
import signal

import pytest
import torch

from owl2.train.recipe import Recipe
from owl2.train.run import train
from tests.train.processes import FSDP, owl2, run, start
from tests.train.runs import assert_same_weights, quiet, read_jsonl, wait_for, weights, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_save_one_adapter_and_resume(recipe, tmp_path, environment):
    adapter = {
        "r": 2,
        "parts": ["decoder", "vision"],
        "modules_to_save": ["abstractor"],
        "lora_dropout": 0.0,
    }
    settings = recipe(lora=adapter, max_steps=30, logging_steps=1).model_dump(exclude_unset=True)
    settings["data"] = [{"file": source["file"]} for source in settings["data"]]
    single = train(Recipe(**settings | {"output": str(tmp_path / "one")}), quiet())
    uninterrupted = Recipe(**settings | {"output": str(tmp_path / "two")})
    run(tmp_path / "output", train, uninterrupted, count=2, environment=environment)
    names = {path.name for path in single.model.iterdir()}
    assert {path.name for path in (tmp_path / "two" / "model").iterdir()} == names
    one, two = weights(single.model), weights(tmp_path / "two" / "model")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-3, msg=name)

    path = write_recipe(tmp_path, settings)
    log = tmp_path / "run" / "log.jsonl"
    processes = start(tmp_path / "1", owl2, "train", path, count=2, environment=environment)
    wait_for(lambda: len(read_jsonl(log)) >= 4, processes.output)
    os.kill(processes.members[0].pid, signal.SIGTERM)
    assert processes.wait() == [143, 143], processes.output()
    run(tmp_path / "2", owl2, "train", path, count=2, environment=environment)
    assert_same_weights(two, weights(tmp_path / "run" / "model"))
