"""Whole runs, from a recipe to a model: reports, what is refused."""

import io
import json
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console

from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.train.runs import assert_same_weights, interrupt_at, quiet, weights
from tests.train.tiny import QUESTION, ROWS


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
    assert facts["num_skipped"] == 0
    assert facts["frozen_parameters"] == 0
    assert facts["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["peak_memory_bytes"]["process"] > 10_000_000
    assert facts["seconds"] > 0
    assert {"owl2", "python", "torch", "transformers"} < facts["versions"].keys()
    with Image.open(result.output / "loss.png") as plot:
        assert plot.size == (960, 720)

    shown = console.file.getvalue()
    assert "Trainable parameters" in shown
    assert "24 samples an epoch, images at 8 x 8 pixels" in shown
    assert "step     10/10  loss" in shown
    assert "{" not in shown  # none of the Trainer's dicts


def test_it_learns(recipe):
    result = train(recipe(max_steps=120, batch_size=8), quiet())
    facts = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (result.output / "log.jsonl").open(encoding="utf-8")]
    assert facts["smoothed_loss"] < lines[0]["loss"] / 4


def test_stage_2_starts_from_what_stage_1_left(recipe, world, tmp_path, monkeypatch):
    first = train(recipe(stage=1, output=str(tmp_path / "1")), quiet())
    begun = {}
    go = Owl2Trainer.train

    def spy(self, *args, **kwargs):
        begun.update({name: t.clone() for name, t in self.model.state_dict().items()})
        return go(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "train", spy)
    second = train(recipe(model=str(first.model), output=str(tmp_path / "2")), quiet())
    start, one, two = (weights(path) for path in (world / "start", first.model, second.model))
    assert_same_weights(begun, one)
    name = "model.visual_abstractor.query_embeds"  # which both stages train
    assert not torch.equal(one[name], start[name]) and not torch.equal(two[name], one[name])


def test_another_resolution_reaches_model_and_processor(recipe):
    result = train(recipe(image_size=16, max_steps=3), quiet())
    assert Owl2ForConditionalGeneration.from_pretrained(result.model).config.image_size == 16
    assert Owl2Processor.from_pretrained(result.model).image_processor.size == 16


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
def test_a_broken_image_is_named_without_a_traceback(recipe, tmp_path, workers):
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    rows = [{"image": "gone.png", "conversations": turns}]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    bad = recipe(data=[{"file": str(tmp_path / "bad.json")}], dataloader_num_workers=workers)
    with pytest.raises(InputError) as caught:
        train(bad, quiet())
    assert "gone.png" in str(caught.value)
    assert "bad.json, row 1" in str(caught.value)
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
            on_invalid_sample="skip",
            epochs=1.0,
            max_steps=None,
        ),
        quiet(),
    )
    facts = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert facts["num_skipped"] == 3
    assert facts["samples"] == ROWS - 3
    lines = (result.output / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    skipped = sorted((json.loads(line) for line in lines), key=lambda line: line["source"])
    assert [line["source"] for line in skipped] == [
        f"{world / 'long.json'}, row {row}" for row in (1, 2, 3)
    ]
    assert {line["code"] for line in skipped} == {ErrorCode.NO_LABELS}


def test_samples_all_cut_to_nothing_are_refused(recipe, tmp_path):
    short = recipe(max_length=9, max_steps=9, epochs=None, on_invalid_sample="skip")
    with pytest.raises(InputError, match=r"after 6 steps there was nothing to learn.*max_length"):
        train(short, quiet())  # an epoch has six
    assert not (tmp_path / "run" / "model").exists()


def test_a_sample_cut_to_nothing_stops_the_run_by_default(recipe, tmp_path):
    with pytest.raises(
        InputError, match=r"data\.json, row \d+: nothing to learn.*on_invalid_sample=skip"
    ):
        train(recipe(max_length=9), quiet())
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("save_steps", [None, 2])
def test_weights_that_the_last_update_spoilt_are_not_saved(recipe, tmp_path, save_steps):
    steps = 2 if save_steps is None else 3
    spoilt = recipe(learning_rate=1e99, warmup_steps=1, max_steps=steps, save_steps=save_steps)
    with pytest.raises(InputError, match=r"step 2: after its update \S+ is not finite"):
        train(spoilt, quiet())
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_samples_longer_than_the_models_context_are_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=r"max_length \(2049\).* 2048 .*to at most 2048"):
        train(recipe(max_length=2049), quiet())
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(recipe):
    with pytest.raises(InputError, match="/proc/run/model cannot be written"):
        train(recipe(output="/proc/run"), quiet())


def test_without_matplotlib_there_is_a_hint(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    console = quiet()
    result = train(recipe(max_steps=3), console)
    assert result.model.is_dir()
    assert not (result.output / "loss.png").exists()
    assert "pip install 'owl2-vlm[plot]'" in console.file.getvalue()


def test_on_a_terminal_there_is_a_live_line(recipe):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    train(recipe(), console)
    shown = console.file.getvalue()
    assert "step 10/10" in shown
    assert "samples/s" in shown
    assert "step      1/10" not in shown  # the plain lines are for files
