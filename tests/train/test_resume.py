"""Runs that are stopped, killed or damaged, and how they go on."""

import json
import signal

import pytest
import torch

from owl2.errors import InputError
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.train.runs import assert_same_weights, interrupt_at, quiet, weights


# In the first epoch, at its end, in the second.
@pytest.mark.parametrize(
    ("step", "workers"),
    [
        pytest.param(3, 0, marks=pytest.mark.slow),
        pytest.param(6, 0, marks=pytest.mark.slow),
        (8, 2),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(recipe, tmp_path, monkeypatch, step, workers):
    settings = {
        "dataloader_num_workers": workers,
        "data": recipe().data,
        "gradient_accumulation_steps": 2,
    }
    whole = train(recipe(output=str(tmp_path / "whole"), **settings), quiet())
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        stopped = train(recipe(**settings), quiet())
    assert signal.getsignal(signal.SIGINT) is handler
    assert (stopped.finished, stopped.step) == (False, step)
    assert not stopped.model.exists()

    console = quiet()
    resumed = train(recipe(**settings), console)
    assert f"Resuming after step {step}" in console.file.getvalue()
    assert resumed.finished
    assert_same_weights(weights(whole.model), weights(resumed.model))
    logs = [
        [json.loads(line) for line in (run.output / "log.jsonl").open(encoding="utf-8")]
        for run in (whole, resumed)
    ]
    last = [{k: log[-1][k] for k in ("step", "learning_rate", "samples")} for log in logs]
    assert last[0] == last[1]
    steps = [line["step"] for line in logs[1]]
    assert steps == sorted(set(steps))
    assert not (resumed.output / "checkpoints").exists()


def test_a_killed_run_goes_on_from_its_last_whole_state(recipe, tmp_path, monkeypatch):
    whole = train(recipe(output=str(tmp_path / "whole")), quiet())

    class Killed(BaseException):
        pass

    def die(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise Killed
        return compute(self, *args, **kwargs)

    compute = Owl2Trainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(Owl2Trainer, "training_step", die)
        with pytest.raises(Killed):
            train(recipe(save_steps=3), quiet())
    checkpoints = tmp_path / "run" / "checkpoints"
    saved = {path.name for path in checkpoints.iterdir()}
    assert saved == {"recipe.json", "latest.json", "checkpoint-6"}  # one state, not all
    # A state that the kill cut short is not what is gone on from.
    (checkpoints / "checkpoint-9").mkdir()
    (checkpoints / "checkpoint-9" / "trainer_state.json").write_text("{", encoding="utf-8")
    resumed = train(recipe(), quiet())  # also without save_steps: it changes nothing learned
    assert_same_weights(weights(whole.model), weights(resumed.model))


@pytest.fixture
def stopped(recipe, monkeypatch):
    """The checkpoints of a run stopped after step 4."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        return train(recipe(), quiet()).output / "checkpoints"


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [remove, empty])
@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors"],
)
def test_a_state_that_lacks_something_is_not_gone_on_from(recipe, stopped, name, damage):
    damage(stopped / "checkpoint-4" / name)
    named = name.replace(".", r"\.")
    with pytest.raises(InputError, match=f"checkpoint-4 lacks {named}.*overwrite=true starts over"):
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
def test_damaged_files_of_a_stopped_run(recipe, stopped, name, content):
    if content is None:
        (stopped / name).unlink()
    else:
        (stopped / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="overwrite=true starts over"):
        train(recipe(), quiet())
    console = quiet()
    assert train(recipe(overwrite=True, max_steps=3), console).finished
    assert "Going on" not in console.file.getvalue()


def test_half_a_line_at_the_logs_end_is_dropped(recipe, stopped):
    log = stopped.parent / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 5, "lo')
    result = train(recipe(), quiet())
    lines = [json.loads(line) for line in log.open(encoding="utf-8")]
    assert log.read_bytes().startswith(whole)
    assert lines[-1]["step"] == result.step == 10


def test_a_log_damaged_further_up_is_refused(recipe, stopped):
    log = stopped.parent / "log.jsonl"
    log.write_bytes(b"{\n" + log.read_bytes())
    with pytest.raises(InputError, match=r"log.jsonl:1 .*overwrite=true starts over"):
        train(recipe(), quiet())


def test_two_runs_of_a_recipe_are_the_same(recipe, tmp_path):
    runs = [train(recipe(output=str(tmp_path / name)), quiet()) for name in "ab"]
    assert_same_weights(*(weights(run.model) for run in runs))


def test_another_recipe_does_not_go_on_with_a_run(recipe, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        train(recipe(), quiet())
    with pytest.raises(InputError, match=r"another recipe \(differs in batch_size, seed\)"):
        train(recipe(seed=5, batch_size=8), quiet())
    console = quiet()
    assert train(recipe(seed=5, batch_size=8, overwrite=True), console).finished
    assert "Going on" not in console.file.getvalue()


def test_a_finished_model_is_not_overwritten_unasked(recipe):
    result = train(recipe(), quiet())
    before = weights(result.model)
    with pytest.raises(
        InputError, match="finished model; give another `output`, or overwrite=true"
    ):
        train(recipe(seed=1), quiet())
    assert_same_weights(weights(result.model), before)
    train(recipe(seed=1, overwrite=True), quiet())
    assert not torch.equal(weights(result.model)["lm_head.weight"], before["lm_head.weight"])


def test_an_overwriting_run_goes_on_after_a_stop(recipe, monkeypatch):
    train(recipe(), quiet())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        stopped = train(recipe(seed=1, overwrite=True), quiet())
    assert stopped.model.exists()  # the older one, until there is another
    console = quiet()
    assert train(recipe(seed=1, overwrite=True), console).finished
    assert "Resuming after step 4" in console.file.getvalue()
