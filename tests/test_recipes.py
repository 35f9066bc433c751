"""All shipped recipes are valid, follow the paper and run with a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from owl2.data.datasets import load_dataset
from owl2.data.datasets.registry import DATASET_CARDS
from owl2.train.recipe_file import read_recipe
from tests.train.test_recipe import PAPER

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RUNS = sorted(
    path
    for path in RECIPES.rglob("*.yaml")
    if "output" in (content := yaml.safe_load(path.read_text())) and "arms" not in content
)

# Settings of the paper's recipes beyond the defaults that `tests/train/test_recipe.py` checks.
FIXED = {
    "vision_learning_rate": None,
    "abstractor_learning_rate": None,
    "dtype": "bfloat16",
    "lora": None,
    "quantize": None,
    "freeze": [],
    "packing": False,
    "group_by_length": False,
}
MIXTURE = {  # thousands of samples
    "sharegpt": 40,
    "slimorca": 518,
    "llava": 158,
    "coco": 82,
    "textcaps": 22,
    "vqav2": 83,
    "gqa": 72,
    "okvqa": 9,
    "ocr_vqa": 80,
    "aokvqa": 50,
    "refcoco": 30,
    "visual_genome": 86,
}
PRETRAINING = {"cc3m", "cc12m", "coco", "laion", "coyo", "datacomp"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_is_valid_and_its_datasets_load(path):
    recipe = read_recipe(path)
    for source in recipe.data:
        if source.dataset is not None:
            options = source.options | ({"style": source.style} if source.style else {})
            assert len(load_dataset(source.dataset, source.split, **options)) > 0


def test_recipes_of_a_folder_share_settings_through_a_base():
    for folder in {path.parent for path in RUNS}:
        roots = [path for path in RUNS if path.parent == folder and not _base(path)]
        for path in roots:
            for other in roots:
                one, two = (_settings(file) for file in (path, other))
                assert path == other or len(one & two) < 0.5 * min(len(one), len(two)), path


def _base(path):
    return yaml.safe_load(path.read_text()).get("base")


def _settings(path):
    return {str(item) for item in yaml.safe_load(path.read_text()).items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_paper_recipes_have_the_settings_of_the_paper(stage):
    recipe = read_recipe(RECIPES / "paper" / f"stage{stage}.yaml")
    expected = {name: values[stage - 1] for name, values in PAPER.items()} | FIXED
    assert recipe.stage == stage
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_stage2_mixture_is_that_of_the_paper():
    recipe = read_recipe(RECIPES / "paper" / "stage2.yaml")
    counts = {source.name: source.count for source in recipe.data}
    assert counts == {name: 1000 * thousands for name, thousands in MIXTURE.items()}
    assert sum(counts.values()) == 1_230_000
    text_only = {source.name for source in recipe.data if source.images is None}
    assert text_only == {"sharegpt", "slimorca"}
    for source in recipe.data:  # files as `owl2 data convert NAME` makes them
        assert Path(source.file).suffix == ".jsonl" and Path(source.file).stem in DATASET_CARDS


def test_stage1_data_is_that_of_the_paper():
    recipe = read_recipe(RECIPES / "paper" / "stage1.yaml")
    assert {source.name for source in recipe.data} == PRETRAINING
    assert recipe.max_steps * recipe.batch_size == 348_160_000
    second = read_recipe(RECIPES / "paper" / "stage2.yaml")
    assert second.model == f"{recipe.output}/model"


def test_finetuning_starts_from_the_released_weights():
    recipes = {
        n: read_recipe(RECIPES / "finetune" / f"{n}.yaml") for n in ("full", "lora", "qlora")
    }
    for recipe in recipes.values():
        assert recipe.model == "MAGAer13/mplug-owl2-llama2-7b"
        assert recipe.stage == 2 and recipe.image_size == 448 and recipe.gradient_checkpointing
    kinds = [(r.lora is not None, r.quantize) for r in recipes.values()]
    assert kinds == [(False, None), (True, None), (True, "4bit")]
    assert len({recipe.output for recipe in recipes.values()}) == 3


def test_stage2_starts_from_the_output_of_stage1():
    for prefix in ("", "long_"):
        first = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage1.yaml")
        second = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage2.yaml")
        assert (first.stage, second.stage) == (1, 2)
        assert second.model == f"{first.output}/model"


@pytest.mark.slow
def test_recipes_run_with_a_tiny_model(tmp_path):
    """`make recipes-quick`: a few steps of each; about a minute on two cores."""
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", RECIPES / "small.sh", tmp_path / "small"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("stage1", "stage2", "full", "lora"):
        assert (tmp_path / "small" / name / "model").is_dir(), name
        assert (tmp_path / "small" / name / "run.json").is_file(), name
