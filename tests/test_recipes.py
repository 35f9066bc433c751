"""Every recipe that is shipped can be read, says what the paper says, and runs in small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from owl2.data.datasets import load_dataset
from owl2.data.datasets.registry import PUBLIC
from owl2.train.recipe_file import read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RUNS = sorted(
    path for path in RECIPES.rglob("*.yaml") if "output" in yaml.safe_load(path.read_text())
)

# SPEC §2's table, written down by hand.
BOTH = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.0,
    "vision_layer_decay": 0.9,
    "vision_learning_rate": None,
    "abstractor_learning_rate": None,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "adapter": None,
    "quantize": None,
    "frozen": [],
    "packing": False,
    "group_by_length": False,
    "epochs": None,
}
PAPER = {
    "stage1": BOTH
    | {
        "stage": 1,
        "image_size": 224,
        "max_length": 256,
        "augment": "crop_flip",
        "weight_decay": 0.05,
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-6,
        "warmup_steps": 1000,
        "max_steps": 42_500,
        "batch_size": 8192,
    },
    "stage2": BOTH
    | {
        "stage": 2,
        "image_size": 448,
        "max_length": 2048,
        "augment": "none",
        "weight_decay": 0.0,
        "learning_rate": 2e-5,
        "min_learning_rate": 1e-7,
        "warmup_steps": 250,
        "max_steps": 4800,
        "batch_size": 256,
    },
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
def test_a_recipe(path):
    recipe = read_recipe(path)
    for source in recipe.data:
        if source.dataset is not None:
            options = source.options | ({"style": source.style} if source.style else {})
            assert len(load_dataset(source.dataset, source.split, **options)) > 0


def test_no_recipe_is_a_copy():
    """What two recipes of a folder have in common is said once, in a `base`."""
    for folder in {path.parent for path in RUNS}:
        bare = [path for path in RUNS if path.parent == folder and not _base(path)]
        for path in bare:
            for other in bare:
                mine, its = (_lines(file) for file in (path, other))
                assert path == other or len(mine & its) < 0.5 * min(len(mine), len(its)), path


def _base(path):
    return yaml.safe_load(path.read_text()).get("base")


def _lines(path):
    return {str(item) for item in yaml.safe_load(path.read_text()).items()}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_settings(name):
    recipe = read_recipe(RECIPES / "paper" / f"{name}.yaml")
    found = {setting: getattr(recipe, setting) for setting in PAPER[name]}
    assert found == PAPER[name]


def test_the_paper_s_mixture():
    recipe = read_recipe(RECIPES / "paper" / "stage2.yaml")
    counts = {source.name: source.count for source in recipe.data}
    assert counts == {name: 1000 * thousands for name, thousands in MIXTURE.items()}
    assert sum(counts.values()) == 1_230_000
    words = {source.name for source in recipe.data if source.images is None}
    assert words == {"sharegpt", "slimorca"}
    for source in recipe.data:  # files as `owl2 data convert NAME` makes them
        assert Path(source.file).suffix == ".jsonl" and Path(source.file).stem in PUBLIC


def test_the_paper_s_pre_training():
    recipe = read_recipe(RECIPES / "paper" / "stage1.yaml")
    assert {source.name for source in recipe.data} == PRETRAINING
    assert recipe.max_steps * recipe.batch_size == 348_160_000
    second = read_recipe(RECIPES / "paper" / "stage2.yaml")
    assert second.model == f"{recipe.output}/model"


def test_fine_tuning_starts_from_the_released_weights():
    recipes = {
        n: read_recipe(RECIPES / "finetune" / f"{n}.yaml") for n in ("full", "lora", "qlora")
    }
    for recipe in recipes.values():
        assert recipe.model == "MAGAer13/mplug-owl2-llama2-7b"
        assert recipe.stage == 2 and recipe.image_size == 448 and recipe.gradient_checkpointing
    kinds = [(r.adapter is not None, r.quantize) for r in recipes.values()]
    assert kinds == [(False, None), (True, None), (True, "4bit")]
    assert len({recipe.output for recipe in recipes.values()}) == 3


def test_the_stages_follow_each_other():
    for prefix in ("", "long_"):
        first = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage1.yaml")
        second = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage2.yaml")
        assert (first.stage, second.stage) == (1, 2)
        assert second.model == f"{first.output}/model"


@pytest.mark.slow
def test_the_recipes_run_in_small(tmp_path):
    """`make recipes-quick`: each of them for some steps; about a minute on two cores."""
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
