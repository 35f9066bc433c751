"""Whole runs, from a recipe to a model: reports, stops, going on, what is refused."""

import io
import json
import os
import signal
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console

from owl2.errors import InputError
from owl2.model.owl2 import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.train.tiny import QUESTION, ROWS


def quiet():
    return Console(file=io.StringIO(), width=120)


def weights(directory):
    model = Owl2ForConditionalGeneration.from_pretrained(directory)
    return model.state_dict()


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def test_a_run_leaves_a_model_and_its_reports(recipe, world):
    console = quiet()
    result = train(recipe(), console)
    assert (result.finished, result.step, result.steps) == (True, 10, 10)
    names = {path.name for path in result.output.iterdir()}
    assert names == {"model", "log.jsonl", "loss.png", "run.json"}

    model = Owl2ForConditionalGeneration.from_pretrained(result.model)
    processor = Owl2Processor.from_pretrained(result.model)
    batch = processor.for_training(
        [
            {"role": "user", "content": [{"type": "image", "path": str(world / "0.png")}]},
            {"role": "assistant", "content": "red"},
        ]
    )
    assert torch.isfinite(model(**batch).loss)
    # The Trainer's own settings do not leak into the checkpoint.
    assert model.config.use_cache
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (world / "start", result.model)
    )
    assert before == after

    lines = [json.loads(line) for line in (result.output / "log.jsonl").open(encoding="utf-8")]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10]
    assert lines[-1]["samples"] == 40
    assert {"loss", "smoothed_loss", "learning_rate", "grad_norm", "seconds"} < lines[0].keys()
    assert lines[2]["learning_rate"] == pytest.approx(1e-2, rel=0.2)  # the peak, not the ViT's

    facts = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert facts["recipe"] == recipe().model_dump(mode="json")
    assert facts["samples"] == 40
    assert facts["samples_left_out"] == 0
    assert facts["frozen_parameters"] == 0
    assert facts["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["peak_memory_bytes"]["process"] > 10_000_000
    assert facts["seconds"] > 0
    assert {"owl2", "python", "torch", "transformers"} < facts["versions"].keys()
    with Image.open(result.output / "loss.png") as plot:
        assert plot.size == (960, 600)

    shown = console.file.getvalue()
    assert "What is trained" in shown
    assert "24 samples an epoch, pictures at 8 x 8 pixels" in shown
    assert "step     10/10  loss" in shown
    assert "{" not in shown  # none of the Trainer's dicts


def test_it_learns(recipe):
    result = train(recipe(max_steps=120, batch_size=8), quiet())
    facts = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (result.output / "log.jsonl").open(encoding="utf-8")]
    assert facts["smoothed_loss"] < lines[0]["loss"] / 4


def test_stage_1_then_stage_2(recipe, tmp_path):
    first = train(recipe(stage=1, output=str(tmp_path / "1")), quiet())
    second = train(recipe(model=str(first.model), output=str(tmp_path / "2")), quiet())
    one, two = weights(first.model), weights(second.model)
    assert not torch.equal(one["lm_head.weight"], two["lm_head.weight"])


def test_another_resolution_reaches_model_and_processor(recipe):
    result = train(recipe(image_size=16, max_steps=3), quiet())
    assert Owl2ForConditionalGeneration.from_pretrained(result.model).config.image_size == 16
    assert Owl2Processor.from_pretrained(result.model).image_processor.size == 16


# ------------------------------------------------------------------ stopping and going on


def interrupt_at(monkeypatch, step):
    """Ctrl-C while this step is being computed."""
    compute = Owl2Trainer.training_step
    pressed = False

    def computing(self, *args, **kwargs):
        nonlocal pressed
        if self.state.global_step + 1 == step and not pressed:
            pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", computing)


# In the first epoch, at its end, in the second.
@pytest.mark.parametrize(("step", "workers"), [(3, 0), (6, 0), (8, 2)])
def test_interrupted_and_resumed_equals_uninterrupted(recipe, tmp_path, monkeypatch, step, workers):
    settings = {"workers": workers, "data": recipe().data, "gradient_accumulation": 2}
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
    assert f"Going on after step {step}" in console.file.getvalue()
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
            train(recipe(save_every=3), quiet())
    checkpoints = tmp_path / "run" / "checkpoints"
    saved = {path.name for path in checkpoints.iterdir()}
    assert saved == {"recipe.json", "latest.json", "checkpoint-6"}  # one state, not all
    # A state that the kill cut short is not what is gone on from.
    (checkpoints / "checkpoint-9").mkdir()
    (checkpoints / "checkpoint-9" / "trainer_state.json").write_text("{", encoding="utf-8")
    resumed = train(recipe(), quiet())  # also without save_every: it changes nothing learned
    assert_same_weights(weights(whole.model), weights(resumed.model))


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
    assert "Going on after step 4" in console.file.getvalue()


# ------------------------------------------------------------------ what is refused or left out


def test_a_slip_in_the_recipe_costs_no_saved_state(recipe, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        train(recipe(), quiet())
    with pytest.raises(InputError):
        train(recipe(model=str(tmp_path / "nowhere"), overwrite=True), quiet())
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4").is_dir()


def test_data_that_is_not_there(recipe, tmp_path):
    with pytest.raises(InputError, match=r"gone\.json"):
        train(recipe(data=[{"file": str(tmp_path / "gone.json")}]), quiet())
    with pytest.raises(InputError, match="easy_vqua"):
        train(recipe(data=[{"dataset": "easy_vqua"}]), quiet())
    with pytest.raises(InputError, match="styel"):
        train(recipe(data=[{"dataset": "easy_vqa", "options": {"styel": "x"}}]), quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_without_a_traceback(recipe, tmp_path, workers):
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    rows = [{"image": "gone.png", "conversations": turns}]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    bad = recipe(data=[{"file": str(tmp_path / "bad.json")}], workers=workers)
    with pytest.raises(InputError) as caught:
        train(bad, quiet())
    assert "gone.png" in str(caught.value)
    assert "bad.json:0" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_samples_cut_to_nothing_are_counted(recipe, world):
    processor = Owl2Processor.from_pretrained(world / "start")
    rows = json.loads((world / "data.json").read_text(encoding="utf-8"))
    for row in rows[:3]:
        row["conversations"][0]["value"] = "<image>" + QUESTION * 20
    (world / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    longest = 3 + len(processor.tokenizer(QUESTION).input_ids) + 30
    result = train(
        recipe(
            data=[{"file": str(world / "long.json")}],
            max_length=longest,
            epochs=1.0,
            max_steps=None,
        ),
        quiet(),
    )
    facts = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert facts["samples_left_out"] == 3
    assert facts["samples"] == ROWS - 3


def test_without_matplotlib_there_is_a_hint(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    console = quiet()
    result = train(recipe(max_steps=3), console)
    assert result.model.is_dir()
    assert not (result.output / "loss.png").exists()
    assert "pip install 'mplug-owl2[plot]'" in console.file.getvalue()


def test_on_a_terminal_there_is_a_live_line(recipe):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    train(recipe(), console)
    shown = console.file.getvalue()
    assert "step 10/10" in shown
    assert "samples/s" in shown
    assert "step      1/10" not in shown  # the plain lines are for files
