"""Runs from a recipe to a model: reports, invalid inputs, skipped samples."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.default_templates import CHAT_TEMPLATES
from owl2.processing.processor import Owl2Processor
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.train.runs import (
    assert_same_weights,
    quiet,
    read_jsonl,
    recorded,
    released_state,
    train_until,
    weights,
)
from tests.train.tiny import QUESTION, ROWS


def test_run_writes_a_model_and_reports(recipe, world, real_plots):
    console = recorded()
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
    # The Trainer does not change the configuration of the checkpoint.
    assert model.config.use_cache
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (world / "start", result.model)
    )
    assert before == after

    lines = read_jsonl(result.output / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10]
    assert lines[-1]["samples"] == 40
    assert {"loss", "smoothed_loss", "learning_rate", "grad_norm", "seconds"} < lines[0].keys()
    assert lines[2]["learning_rate"] == pytest.approx(
        1e-2, rel=0.2
    )  # of the decoder, not of the ViT

    results = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert results["recipe"] == recipe().model_dump(mode="json")
    assert results["samples"] == 40
    assert results["num_skipped"] == 0
    assert results["frozen_parameters"] == 0
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert results["peak_memory_bytes"]["process"] > 10_000_000
    assert results["seconds"] > 0
    assert {"owl2", "python", "torch", "transformers"} < results["versions"].keys()
    with Image.open(result.output / "loss.png") as plot:
        assert plot.size == (960, 720)

    text = console.file.getvalue()
    assert "decoder: visual" in text and "Parameter groups" in text
    assert "24 samples per epoch, images of 8 x 8 pixels" in text
    assert "step     10/10  loss" in text
    assert "{" not in text  # the Trainer would print dicts


def test_a_second_run_with_the_same_output_is_refused(recipe, other_process_in):
    settings = recipe(max_steps=3)
    with (
        other_process_in(Path(settings.output)),
        raises_input_error(ErrorCode.CONFLICT, settings.output),
    ):
        train(settings, quiet())
    assert train(settings, quiet()).finished
    with raises_input_error(ErrorCode.FILE_EXISTS, settings.output, "overwrite=true"):
        train(settings, quiet())


def test_loss_decreases(recipe):
    result = train(recipe(max_steps=80, batch_size=8), quiet())
    results = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    lines = read_jsonl(result.output / "log.jsonl")
    assert results["smoothed_loss"] < lines[0]["loss"] / 4


def test_stage_2_starts_from_the_model_of_stage_1(recipe, world, tmp_path, monkeypatch):
    first = train(recipe(stage=1, output=str(tmp_path / "1")), quiet())
    initial = {}
    original_train = Owl2Trainer.train

    def record(self, *args, **kwargs):
        initial.update({name: t.clone() for name, t in released_state(self.model).items()})
        return original_train(self, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "train", record)
    second = train(recipe(model=str(first.model), output=str(tmp_path / "2")), quiet())
    start, one, two = (weights(path) for path in (world / "start", first.model, second.model))
    assert_same_weights(initial, one)
    name = "model.visual_abstractor.query_embeds"  # trained in both stages
    assert not torch.equal(one[name], start[name]) and not torch.equal(two[name], one[name])


def test_image_size_applies_to_model_and_processor(recipe):
    result = train(recipe(image_size=16, max_steps=3), quiet())
    assert Owl2ForConditionalGeneration.from_pretrained(result.model).config.image_size == 16
    assert Owl2Processor.from_pretrained(result.model).image_processor.edge == 16


@pytest.mark.parametrize("name", [None, "v1"])
def test_chat_template_and_line_break_are_saved_with_the_model(recipe, world, name):
    start = Owl2Processor.from_pretrained(world / "start")
    result = train(recipe(chat_template=name, max_steps=3), quiet())
    trained = Owl2Processor.from_pretrained(result.model)
    assert (start.image_newline, trained.image_newline) == (False, True)
    assert trained.chat_template == CHAT_TEMPLATES[name or "mplug_owl2"]


# ------------------------------------------------------------------ invalid inputs


def test_invalid_recipe_keeps_the_saved_checkpoint(recipe, tmp_path):
    train_until(4, recipe())
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, tmp_path / "nowhere"):
        train(recipe(model=str(tmp_path / "nowhere"), overwrite=True), quiet())
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4").is_dir()


def test_model_whose_replacement_was_interrupted_is_kept(recipe, tmp_path):
    previous = tmp_path / "run" / ".model.previous"
    previous.mkdir(parents=True)
    (previous / "config.json").write_text("{}")
    with raises_input_error(ErrorCode.FILE_EXISTS, tmp_path / "run" / "model"):
        train(recipe(), quiet())
    assert [path.name for path in (tmp_path / "run" / "model").iterdir()] == ["config.json"]
    assert not previous.exists()


def test_missing_data_is_refused(recipe, tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "missing.json"):
        train(recipe(data=[{"file": str(tmp_path / "missing.json")}]), quiet())
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "easy_vqua"):
        train(recipe(data=[{"dataset": "easy_vqua"}]), quiet())
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "styel"):
        train(recipe(data=[{"dataset": "easy_vqa", "options": {"styel": "x"}}]), quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_image_is_reported_with_its_row(recipe, tmp_path, workers):
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    rows = [{"image": "missing.png", "conversations": turns}]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    bad = recipe(data=[{"file": str(tmp_path / "bad.json")}], dataloader_num_workers=workers)
    with pytest.raises(InputError) as caught:
        train(bad, quiet())
    assert "missing.png" in str(caught.value)
    assert "bad.json, row 1" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_samples_without_labels_after_truncation_are_skipped(recipe, world):
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
    results = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert results["num_skipped"] == 3
    assert results["samples"] == ROWS - 3
    lines = read_jsonl(result.output / "skipped.jsonl")
    skipped = sorted(lines, key=lambda line: line["source"])
    assert [line["source"] for line in skipped] == [
        f"{world / 'long.json'}, row {row}" for row in (1, 2, 3)
    ]
    assert {line["code"] for line in skipped} == {ErrorCode.NO_LABELS}


def test_epoch_without_labels_is_refused(recipe, tmp_path):
    short = recipe(max_length=9, max_steps=9, epochs=None, on_invalid_sample="skip")
    with raises_input_error(ErrorCode.EMPTY_DATASET, "first 24 samples", "max_length"):
        train(short, quiet())  # an epoch has 6 steps
    assert not (tmp_path / "run" / "model").exists()


def test_sample_without_labels_stops_the_run_by_default(recipe, tmp_path):
    with raises_input_error(ErrorCode.NO_LABELS, "data.json, row ", "on_invalid_sample=skip"):
        train(recipe(max_length=9), quiet())
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("save_steps", [None, 2])
def test_weights_that_are_not_finite_are_not_saved(recipe, tmp_path, save_steps):
    steps = 2 if save_steps is None else 3
    diverging = recipe(learning_rate=1e99, warmup_steps=1, max_steps=steps, save_steps=save_steps)
    with raises_input_error(ErrorCode.NON_FINITE, "step 2", "model."):
        train(diverging, quiet())
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_max_length_beyond_the_context_is_refused(recipe, tmp_path):
    with raises_input_error(ErrorCode.TOO_LONG, "max_length (2049)", "2048 positions"):
        train(recipe(max_length=2049), quiet())
    assert not (tmp_path / "run").exists()


def test_unwritable_output_is_refused(recipe):
    with raises_input_error(ErrorCode.WRITE_FAILED, "/proc/run/model"):
        train(recipe(output="/proc/run"), quiet())


def test_missing_matplotlib_is_reported(recipe, monkeypatch, real_plots):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    console = recorded()
    result = train(recipe(max_steps=3), console)
    assert result.model.is_dir()
    assert not (result.output / "loss.png").exists()
    assert "pip install 'owl2-vlm[plot]'" in console.file.getvalue()


def test_terminal_shows_the_live_panel(recipe):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    train(recipe(), console)
    text = console.file.getvalue()
    assert "step 10/10" in text
    assert "samples/s" in text
    assert "step      1/10" not in text  # the plain lines are for files


def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(recipe, monkeypatch):
    monkeypatch.setattr("owl2.memory.memory_limits", lambda: {"free memory": 100_000})
    monkeypatch.setattr(Owl2ForConditionalGeneration, "from_pretrained", None)
    with raises_input_error(ErrorCode.OUT_OF_MEMORY, "0.1 MB", "owl2 plan"):
        train(recipe(), quiet())
