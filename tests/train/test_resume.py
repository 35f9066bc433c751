"""Resuming runs that were stopped or killed; damaged checkpoints."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as distributed

from owl2.errors import ErrorCode
from owl2.train.checkpointer import find_state
from owl2.train.distributed import DistributedContext
from owl2.train.run import train
from tests.errors import raises_input_error
from tests.train.runs import (
    Killed,
    assert_same_weights,
    kill_at,
    quiet,
    read_jsonl,
    recorded,
    train_until,
    weights,
)


# In the first epoch, at its end, in the second one.
@pytest.mark.parametrize(
    ("step", "workers"),
    [
        pytest.param(3, 0, marks=pytest.mark.slow),
        pytest.param(6, 0, marks=pytest.mark.slow),
        (8, 2),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(recipe, tmp_path, step, workers):
    settings = {
        "dataloader_num_workers": workers,
        "data": recipe().data,
        "gradient_accumulation_steps": 2,
    }
    uninterrupted = train(recipe(output=str(tmp_path / "uninterrupted"), **settings), quiet())
    handler = signal.getsignal(signal.SIGINT)
    stopped = train_until(step, recipe(**settings))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (stopped.finished, stopped.step) == (False, step)
    assert not stopped.model.exists()

    console = recorded()
    resumed = train(recipe(**settings), console)
    assert f"Resuming after step {step}" in console.file.getvalue()
    assert resumed.finished
    assert_same_weights(weights(uninterrupted.model), weights(resumed.model))
    logs = [read_jsonl(run.output / "log.jsonl") for run in (uninterrupted, resumed)]
    last = [{k: log[-1][k] for k in ("step", "learning_rate", "samples")} for log in logs]
    assert last[0] == last[1]
    steps = [line["step"] for line in logs[1]]
    assert steps == sorted(set(steps))
    assert not (resumed.output / "checkpoints").exists()


def test_killed_run_resumes_from_its_last_complete_checkpoint(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            train(recipe(save_steps=3), quiet())
    checkpoints = tmp_path / "run" / "checkpoints"
    saved = {path.name for path in checkpoints.iterdir()}
    assert saved == {"recipe.json", "latest.json", "checkpoint-6"}  # the older one is removed
    # An incomplete checkpoint is not used.
    (checkpoints / "checkpoint-9").mkdir()
    (checkpoints / "checkpoint-9" / "trainer_state.json").write_text("{", encoding="utf-8")
    resumed = train(recipe(), quiet())  # save_steps may differ
    assert_same_weights(weights(uninterrupted.model), weights(resumed.model))


@pytest.fixture(scope="module")
def stopped_run(recipe_in, tmp_path_factory):
    return train_until(4, recipe_in(tmp_path_factory.mktemp("stopped"))).output


@pytest.fixture
def stopped(recipe, stopped_run):
    """The checkpoints directory of a run of `recipe()` that was stopped after step 4."""
    return shutil.copytree(stopped_run, recipe().output) / Path("checkpoints")


def truncate(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors"],
)
def test_incomplete_checkpoint_is_refused(recipe, stopped, name, damage):
    damage(stopped / "checkpoint-4" / name)
    with raises_input_error(
        ErrorCode.RESUME_MISMATCH, f"checkpoint-4 lacks {name}", "overwrite=true"
    ):
        train(recipe(), quiet())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latest.json", ""),
        ("latest.json", "{}"),
        ("latest.json", "[1]"),
        ("latest.json", '{"checkpoint": "checkpoint-4", "progress": {"stop": 4}}'),
        ("latest.json", '{"checkpoint": "checkpoint-3", "progress": {"step": 3}}'),
        ("recipe.json", None),
        ("recipe.json", "{"),
        ("checkpoint-4/trainer_state.json", "{}"),
        ("checkpoint-4/trainer_state.json", "{"),
    ],
)
def test_damaged_state_is_refused(recipe, stopped, name, content):
    if content is None:
        (stopped / name).unlink()
    else:
        (stopped / name).write_text(content, encoding="utf-8")
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "overwrite=true"):
        train(recipe(), quiet())
    console = recorded()
    assert train(recipe(overwrite=True, max_steps=1, warmup_steps=0), console).finished
    assert "Resuming" not in console.file.getvalue()


def test_sharded_weights_of_an_earlier_version_are_refused(recipe, stopped):
    """Their names are in the metadata that torch writes with the shards."""
    folder = stopped / "checkpoint-4" / "pytorch_model_fsdp_0"
    for name, refused in (("multiway.1.k_proj", False), ("k_proj.multiway.1", True)):
        key = f"model.layers.0.self_attn.{name}.weight"
        distributed.save({"model": {key: torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
        if not refused:
            find_state(recipe(), DistributedContext())
            continue
        with raises_input_error(ErrorCode.RESUME_MISMATCH, "pytorch_model_fsdp_0", "earlier"):
            find_state(recipe(), DistributedContext())


@pytest.mark.parametrize("damage", ['"global_step": 5', '"global_step": ?'])
def test_state_of_the_same_size_with_another_step_is_refused(recipe, stopped, damage):
    path = stopped / "checkpoint-4" / "trainer_state.json"
    text = path.read_text(encoding="utf-8")
    assert '"global_step": 4' in text
    path.write_text(text.replace('"global_step": 4', damage), encoding="utf-8")
    with raises_input_error(ErrorCode.RESUME_MISMATCH, str(path), "overwrite=true"):
        train(recipe(), quiet())


def test_incomplete_last_line_of_a_log_is_dropped(recipe, stopped):
    log = stopped.parent / "log.jsonl"
    complete = log.read_bytes()
    log.write_bytes(complete + b'{"step": 5, "lo')
    result = train(recipe(), quiet())
    lines = read_jsonl(log)
    assert log.read_bytes().startswith(complete)
    assert lines[-1]["step"] == result.step == 10


def test_damaged_log_is_refused(recipe, stopped):
    log = stopped.parent / "log.jsonl"
    log.write_bytes(b"{\n" + log.read_bytes())
    with raises_input_error(ErrorCode.INVALID_FORMAT, "log.jsonl, line 1", "overwrite=true"):
        train(recipe(), quiet())


def test_two_runs_of_a_recipe_give_the_same_weights(recipe, uninterrupted):
    assert_same_weights(weights(train(recipe(), quiet()).model), weights(uninterrupted.model))


@pytest.mark.usefixtures("stopped")
def test_run_of_another_recipe_is_not_resumed(recipe):
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "batch_size, seed"):
        train(recipe(seed=5, batch_size=8), quiet())
    console = recorded()
    assert train(recipe(seed=5, batch_size=8, overwrite=True), console).finished
    assert "Resuming" not in console.file.getvalue()


@pytest.fixture
def finished(recipe, uninterrupted):
    """The model directory of a finished run of `recipe()`."""
    return shutil.copytree(uninterrupted.output, recipe().output) / Path("model")


def test_finished_model_is_not_overwritten_by_default(recipe, finished):
    before = weights(finished)
    with raises_input_error(ErrorCode.FILE_EXISTS, finished, "overwrite=true"):
        train(recipe(seed=1), quiet())
    assert_same_weights(weights(finished), before)


def test_overwriting_run_replaces_the_model_when_it_finishes(recipe, finished):
    before = weights(finished)
    train_until(4, recipe(seed=1, overwrite=True))
    assert_same_weights(weights(finished), before)
    console = recorded()
    assert train(recipe(seed=1, overwrite=True), console).finished
    assert "Resuming after step 4" in console.file.getvalue()
    assert not torch.equal(weights(finished)["lm_head.weight"], before["lm_head.weight"])
