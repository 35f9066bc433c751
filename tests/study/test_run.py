"""The runner of a study: paired seeds, shared models, resume, and results of several machines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cells import Runner, Stopped
from rich.console import Console
from run import collect, main, pending_cells, run_cells, write_results
from safetensors.torch import load_file
from study import read_study

from owl2.errors import ErrorCode
from owl2.train.recipe_file import read_recipe
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error

ALL = ["input_layernorm", "post_attention_layernorm", "k_proj", "v_proj"]
SIZES = {
    "llm": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    },
    "vision": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    },
    "abstractor": {"num_hidden_layers": 1, "num_learnable_queries": 2, "intermediate_size": 32},
    "tokenizer": {"dataset": "easy_vqa", "vocab_size": 350},
}
RECIPE = {
    "stage": 2,
    "model": "unused",
    "output": "unused",
    "image_size": None,
    "max_length": 128,
    "max_steps": 3,
    "warmup_steps": 1,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "min_lr": 0.0,
    "gradient_checkpointing": False,
    "dtype": "float32",
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_steps": 1,
}
ARMS = {
    "none": {},
    "full": {"model": {"mam_modules": ALL}},
    "wide": {"model": {"intermediate_size": 56}},
}


@pytest.fixture
def make_study(tmp_path):
    """Writes a study of a tiny model with its recipes; returns the path."""

    def make(name="study", **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "sizes.yaml").write_text(yaml.safe_dump(SIZES))
        for stage, style in (("shared", "captions"), ("stage", "joined")):
            recipe = RECIPE | {"data": [{"dataset": "easy_vqa", "style": style}]}
            (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
        questions = [
            {"question": question, "answers": ["no"]} for question in ("is it red?", "a circle?")
        ]
        (folder / "mine.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
        study = {
            "name": name,
            "output": str(folder / "out"),
            "results": str(folder / "results.json"),
            "start": {"llm": "fresh", "vision": "fresh", "config": str(folder / "sizes.yaml")},
            "shared": [{"recipe": str(folder / "shared.yaml"), "settings": {"stage": 1}}],
            "stages": [{"recipe": str(folder / "stage.yaml")}],
            "arms": ARMS,
            "baseline": "none",
            "seeds": 1,
            "evaluation": {"tasks": str(folder / "mine.jsonl")},
            "keep_models": True,
        }
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
        return path

    return make


def runner_of(path):
    return Runner(read_study(path), Console(quiet=True))


def run(path, limit=None):
    runner = runner_of(path)
    run_cells(runner, pending_cells(runner), limit)
    return json.loads((path.parent / "results.json").read_text())


def weights(path, arm, seed=0):
    [file] = (path.parent / "out" / "cells" / arm / f"seed-{seed}" / "stage1" / "model").glob(
        "*.safetensors"
    )
    return load_file(file)


def fail_at_step(monkeypatch, step):
    """Training raises an exception in this step of the process."""
    training_step, count = Owl2Trainer.training_step, 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", failing)


@pytest.mark.slow
def test_a_study_that_was_interrupted_equals_one_that_was_not(make_study, monkeypatch):
    """In the shared stage, in the stage of a cell, and before its evaluation."""
    arms = {name: ARMS[name] for name in ("none", "full")}
    expected = run(make_study("whole", arms=arms))
    path = make_study("parts", arms=arms)
    for step in (2, 4):  # of the shared stage; of the first cell, after two steps to its end
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fail_at_step(patch, step)
            run(path)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("cells.evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError))
        run(path)
    assert run(path, limit=1)["cells"][0]["arm"] == "none"
    found = run(path)
    assert [cell["arm"] for cell in found["cells"]] == ["none", "full"]
    for one, other in zip(found["cells"], expected["cells"], strict=True):
        for key in ("metrics", "data_order", "parameters", "steps", "tokens"):
            assert one[key] == other[key], key
        ours, whole = (
            weights(p, one["arm"]) for p in (path, path.parents[1] / "whole" / "study.yaml")
        )
        assert ours.keys() == whole.keys()
        assert all(ours[name].equal(whole[name]) for name in ours)


def test_seeds_are_paired(make_study):
    """With the same seed, all arms have the same data in the same order."""
    lora = {"settings": {"lora": {"r": 2}}}
    path = make_study(arms=ARMS | {"lora": lora, "frozen": {"settings": {"freeze": ["decoder"]}}})
    runner = runner_of(path)
    from cells import data_order

    orders = {
        seed: {data_order(*runner.cell_recipes(arm, seed)) for arm in runner.study.arms}
        for seed in (0, 1)
    }
    assert all(len(order) == 1 for order in orders.values())
    assert orders[0] != orders[1]
    # The arms share the untrained model and the shared stage; the seeds do, too.
    assert len({runner.common_models(arm)[-1] for arm in runner.study.arms}) == 1
    keys = {runner.cell_key(arm, seed) for arm in runner.study.arms for seed in (0, 1)}
    assert len(keys) == 10


def test_data_order_is_that_of_training(make_study, monkeypatch):
    """The rows that the training reads, in their order."""
    from cells import data_order, digest

    from owl2.data.mixture import MixtureDataset

    path, rows = make_study(arms={name: ARMS[name] for name in ("none", "full")}), []
    get = MixtureDataset.__getitem__

    def recording(self, index):
        rows.append([index.source, index.row])
        return get(self, index)

    monkeypatch.setattr(MixtureDataset, "__getitem__", recording)
    runner = runner_of(path)
    runner.make_common("none")
    rows.clear()
    runner.run_cell("none", 0)
    [recipe] = runner.cell_recipes("none", 0)
    assert len(rows) >= 12 and data_order(recipe) == digest(rows[:12])


def test_an_arm_with_another_start_has_its_own_common_models(make_study):
    queries = {"start": {"settings": {"abstractor": {"num_learnable_queries": 3}}}}
    shared = {"shared": {"max_steps": 2}}
    runner = runner_of(make_study(arms=ARMS | {"queries": queries, "shared": shared}))
    none, full, other, short = (
        runner.common_models(arm) for arm in ("none", "full", "queries", "shared")
    )
    assert none == full
    assert none[0] != other[0] and none[1] != other[1]
    assert none[0] == short[0] and none[1] != short[1]


@pytest.fixture
def finished_study(make_study):
    """A study with the results of one cell that needed no training."""
    path = make_study()
    runner = runner_of(path)
    cell = {"arm": "none", "seed": 0, "key": runner.cell_key("none", 0), "metrics": {"mine": 0.5}}
    folder = runner.cell_folder("none", 0)
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(cell))
    write_results(runner, None)
    return path


def test_a_cell_in_the_results_is_not_run_again(finished_study):
    """Also without its directory, for example in another checkout."""
    shutil.rmtree(finished_study.parent / "out")
    assert pending_cells(runner_of(finished_study)) == [("full", 0), ("wide", 0)]


def test_results_of_other_settings_are_not_mixed(finished_study):
    recipe = finished_study.parent / "stage.yaml"
    recipe.write_text(recipe.read_text() + "weight_decay: 0.5\n")
    runner = runner_of(finished_study)
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "results.json", "none"):
        pending_cells(runner)
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "seed-0"):
        runner.run_cell("none", 0)
    assert main_code([str(finished_study), "--list"]) == 2


def test_an_interrupted_run_of_other_settings_is_not_continued(make_study, monkeypatch):
    """The model of the arm was created, and its training was interrupted."""
    path = make_study()
    runner = runner_of(path)
    monkeypatch.setattr(runner, "make_common", lambda arm: [Path("common")])
    monkeypatch.setattr("cells.make_arm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runner.run_cell("full", 0)
    make_study(arms=ARMS | {"full": {"model": {"mam_modules": ["k_proj"]}}})
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "seed-0"):
        runner_of(path).run_cell("full", 0)
    make_study()
    with pytest.raises(KeyboardInterrupt):
        runner.run_cell("full", 0)


def test_scores_of_the_start_with_other_settings_are_not_used(make_study, monkeypatch):
    path = make_study()
    monkeypatch.setattr(Runner, "make_common", lambda self, arm: [path.parent / "common" / "model"])
    monkeypatch.setattr(Runner, "scores", lambda *_: {"metrics": {"mine": 0.25}})
    first = runner_of(path).run_start()
    assert runner_of(path).run_start() == first
    make_study(evaluation={"tasks": str(path.parent / "mine.jsonl"), "limit": 1})
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "scores"):
        runner_of(path).run_start()


def test_results_contain_only_runs_with_the_settings_of_the_study(finished_study):
    """A run in `output` from before a change, with a new file for the results."""
    make = json.loads((finished_study.parent / "results.json").read_text())
    assert [cell["arm"] for cell in make["cells"]] == ["none"]
    (finished_study.parent / "results.json").unlink()
    recipe = finished_study.parent / "stage.yaml"
    recipe.write_text(recipe.read_text() + "weight_decay: 0.5\n")
    assert collect(runner_of(finished_study), None)["cells"] == []


def main_code(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run.py", *arguments])
        return main()


def test_results_of_several_machines_are_merged(finished_study, capsys):
    results = finished_study.parent / "results.json"
    content = json.loads(results.read_text())
    runner = runner_of(finished_study)
    for name, key in (("other", runner.cell_key("full", 0)), ("conflict", "other settings")):
        cell = {"arm": "full", "seed": 0, "key": key, "metrics": {"mine": 0.75}}
        file = finished_study.parent / f"{name}.json"
        file.write_text(json.dumps(content | {"cells": [cell]}))
    with raises_input_error(ErrorCode.CONFLICT, "conflict.json", "full"):
        collect(runner, None, [finished_study.parent / "conflict.json"])
    merge = [str(finished_study), "--merge", str(finished_study.parent / "other.json")]
    assert main_code(merge) == 0
    merged = json.loads(results.read_text())["cells"]
    assert {cell["arm"]: cell["metrics"]["mine"] for cell in merged} == {"none": 0.5, "full": 0.75}
    with raises_input_error(ErrorCode.CONFLICT, "conflict.json", "full"):
        collect(runner, None, [finished_study.parent / "conflict.json"])
    assert main_code([str(finished_study), "--list"]) == 0
    assert "full" in capsys.readouterr().out


def test_a_signal_stops_the_study(make_study, monkeypatch):
    path = make_study()

    class Result:
        finished, signal = False, 15

    monkeypatch.setattr("cells.train", lambda *_: Result)
    with pytest.raises(Stopped):
        run(path)
    assert main_code([str(path)]) == 128 + 15


@pytest.mark.parametrize(
    ("code", "error"), [(0, None), (128 + 15, Stopped), (1, ErrorCode.PROCESS_FAILED)], ids=str
)
def test_a_launcher_trains_the_recipe_of_a_stage(code, error, make_study, monkeypatch):
    runner = runner_of(make_study(launcher="launch --with two -m owl2 train"))
    [recipe] = runner.cell_recipes("full", 3)
    calls = []

    def record(command, env):
        calls.append(command)
        assert Path(shutil.which("python", path=env["PATH"])).parent == Path(sys.executable).parent
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr("cells.subprocess.run", record)
    if error is None:
        runner.train(recipe)
    elif error is Stopped:
        with pytest.raises(Stopped):
            runner.train(recipe)
    else:
        with raises_input_error(error, "launch", "1"):
            runner.train(recipe)
    [[*launcher, file]] = calls
    assert launcher == ["launch", "--with", "two", "-m", "owl2", "train"]
    assert read_recipe(file) == recipe and recipe.seed == 3


def test_missing_data_name_the_command(make_study, tmp_path):
    path = make_study(measures={"data": str(tmp_path / "nowhere")})
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "nowhere", "data.py"):
        runner_of(path)
