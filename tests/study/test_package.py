"""The small model: quantized, with a card of its scores, and at most 150 MB."""

import json
import shutil
from functools import partial
from pathlib import Path

import package_model
import pytest
import yaml
from cells import Runner
from package_model import package
from rich.console import Console
from study import read_study

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from tests.errors import raises_input_error

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def trained(study_data, tiny_checkpoint, tmp_path, monkeypatch):
    """The file of a study with a trained arm."""
    monkeypatch.chdir(RECIPES.parent)
    file = tmp_path / "study.yaml"
    settings = {
        "base": str(RECIPES / "small" / "quick.yaml"),
        "output": str(tmp_path / "run"),
        "measures": {"data": str(study_data), "limit": 3},
    }
    file.write_text(yaml.safe_dump(settings))
    runner = Runner(read_study(file), Console(quiet=True))
    # The data of the recipes do not exist; their hashes are part of the names of directories.
    monkeypatch.setattr(Runner, "hash_of", lambda self, path: "hash")
    [*_, last] = runner.cell_recipes("full", 0)
    shutil.copytree(tiny_checkpoint, Path(last.output) / "model")
    start = runner.common_models("full")[0][1]
    shutil.copytree(tiny_checkpoint, start)
    cell = {
        "metrics": {"choice": 0.25, "exact": 0.125},
        "steps": 4321,
        "tokens": 987654,
        "seconds": {"train": 5400},
        "machine": {"cores": 2, "processor": "A processor"},
        "versions": {"torch": "2.99"},
    }
    (runner.cell_folder("full", 0) / "cell.json").write_text(json.dumps(cell))
    few = partial(package_model.Calibration, num_samples=4)
    monkeypatch.setattr(package_model, "Calibration", few)
    return file


def test_card_has_the_scores_of_the_quantized_model(trained, tmp_path):
    found = package(trained, tmp_path / "out" / "model")
    card = (tmp_path / "out" / "model" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlicense: ")
    assert "\n# owl2-small\n" in card and "--model USER/owl2-small " in card
    quantized = found["quantized"]
    title = "one of four, by score"
    [row] = [line for line in card.splitlines() if line.startswith(f"| {title} |")]
    values = [quantized["choice"], quantized["choice_no_image"], 0.25]
    assert row == f"| {' | '.join([title, *(f'{value:.3f}' for value in values)])} |  |"
    for text in ("4,321 steps", "987,654 tokens", "1.5 hours", "A processor", "torch 2.99"):
        assert text in card.replace("\n", " ")
    assert sum(count for count, _, _ in found["categories"].values()) == 3
    engine = Engine.from_pretrained(tmp_path / "out" / "model")
    assert engine.model.config.quantization_config.bits == 4


def test_most_frequent_answers(tmp_path):
    rows = [("color", "red", 1), ("color", "blue", 0), ("color", "red", 0), ("count", "two", 1)]
    (tmp_path / "test_exact.jsonl").write_text(
        "".join(
            json.dumps({"category": category, "expected": [answer], "score": score}) + "\n"
            for category, answer, score in rows
        )
    )
    found = package_model.categories(tmp_path)
    assert found["color"] == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["count"] == (1, 1.0, 1.0)


def test_scores_of_an_earlier_model_are_not_used(trained, tmp_path, monkeypatch):
    old = tmp_path / "scores" / "quantized" / "images.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    monkeypatch.setattr(
        package_model, "_quantize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        package(trained, tmp_path / "model")
    assert not old.exists()


def test_large_checkpoint_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(package_model, "MAX_SIZE", 1000)
    with raises_input_error(ErrorCode.INVALID_VALUE, tmp_path / "model"):
        package(trained, tmp_path / "model")


def test_model_must_be_trained(trained, tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "run.py"):
        package(trained, tmp_path / "model", seed=1)


@pytest.mark.parametrize("name", ["small_model", "quick"])
def test_recipes_are_valid(name, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    study = read_study(RECIPES / "small" / f"{name}.yaml")
    assert study.keep_models and ("full", 0) in study.cells()
