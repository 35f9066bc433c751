"""Two processes train an adapter: they save what one saves, and go on after a stop."""

import json
import os
import signal
import time

import pytest
import torch

from owl2.train.recipe import Recipe
from owl2.train.run import train
from tests.train.processes import FSDP, owl2, run, start
from tests.train.runs import assert_same_weights, quiet, weights


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_save_one_adapter_and_go_on(recipe, tmp_path, environment):
    adapter = {
        "r": 2,
        "parts": ["decoder", "vision"],
        "modules_to_save": ["abstractor"],
        "lora_dropout": 0.0,
    }
    settings = recipe(lora=adapter, max_steps=30, logging_steps=1).model_dump(exclude_unset=True)
    settings["data"] = [{"file": source["file"]} for source in settings["data"]]
    alone = train(Recipe(**settings | {"output": str(tmp_path / "one")}), quiet())
    whole = Recipe(**settings | {"output": str(tmp_path / "two")})
    run(tmp_path / "output", train, whole, count=2, environment=environment)
    names = {path.name for path in alone.model.iterdir()}
    assert {path.name for path in (tmp_path / "two" / "model").iterdir()} == names
    one, two = weights(alone.model), weights(tmp_path / "two" / "model")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-3, msg=name)

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    log = tmp_path / "run" / "log.jsonl"
    processes = start(tmp_path / "1", owl2, "train", str(path), count=2, environment=environment)
    end = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert time.monotonic() < end, processes.output()
        time.sleep(0.005)
    os.kill(processes.members[0].pid, signal.SIGTERM)
    assert processes.wait() == [143, 143], processes.output()
    run(tmp_path / "2", owl2, "train", str(path), count=2, environment=environment)
    assert_same_weights(two, weights(tmp_path / "run" / "model"))
