"""All shipped recipes are valid, follow the paper and run with a tiny model."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from owl2.checkpoints.weight_names import released_name
from owl2.data.datasets import load_dataset
from owl2.data.datasets.registry import DATASET_CARDS
from owl2.train.adapters import apply_lora
from owl2.train.recipe_file import read_recipe
from owl2.train.recipe_sections import LossSettings
from tests.tiny import make_model
from tests.train.test_recipe import PAPER

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RUNS = sorted(
    path
    for path in RECIPES.rglob("*.yaml")
    if "output" in (content := yaml.safe_load(path.read_text()))
    and "results" not in content  # a study
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


@pytest.mark.parametrize("name", ["one_align", "q_align_vqa", "q_align_lora", "deqa", "deqa_lora"])
def test_scoring_recipes_have_the_published_settings(name):
    recipe = read_recipe(RECIPES / "scoring" / f"{name}.yaml")
    is_lora_of_q_align, has_words = name == "q_align_lora", not name.startswith("deqa")
    published = {
        "stage": 2,
        "model": "q-future/one-align" if is_lora_of_q_align else "MAGAer13/mplug-owl2-llama2-7b",
        "image_size": 448,
        "image_policy": "pad",
        "chat_template": "v1",
        "epochs": 2 if name in ("one_align", "q_align_vqa") else 3,
        "learning_rate": 2e-4 if is_lora_of_q_align else 2e-5,
        "abstractor_learning_rate": 2e-5 if is_lora_of_q_align else None,
        "min_lr": 0,
        "warmup_steps": 0.03,
        "weight_decay": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "vision_lr_layer_decay": 1,
        "max_length": 2048,
        "dtype": "bfloat16",
        "loss": None if has_words else LossSettings(),
    }
    assert {key: getattr(recipe, key) for key in published} == published


@pytest.mark.parametrize("name", ["q_align_lora", "deqa_lora"])
def test_lora_of_the_scoring_recipes_has_the_published_targets(name):
    recipe, model = read_recipe(RECIPES / "scoring" / f"{name}.yaml"), make_model()
    apply_lora(model, recipe.lora, seed=0)
    names = {released_name(name) for name, p in model.named_parameters() if p.requires_grad}
    found = {re.split(r"\.layers\.\d+\.|\.lora_", name)[1] for name in names if ".lora_" in name}
    assert found == {"self_attn.q_proj", "self_attn.v_proj.multiway.1"}
    assert any(name.startswith("model.vision_model.") for name in names)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (128, 256, 0.05)


def test_stage2_starts_from_the_output_of_stage1():
    for prefix in ("", "long_"):
        first = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage1.yaml")
        second = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage2.yaml")
        assert (first.stage, second.stage) == (1, 2)
        assert second.model == f"{first.output}/model"


def run_script(*arguments):
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.slow
def test_distortions_run_with_a_few_steps(tmp_path):
    run_script(RECIPES / "scoring" / "distortions" / "run.sh", "--quick", tmp_path / "run")
    for recipe, split in product(("levels", "soft_labels"), ("validation", "test")):
        file = tmp_path / "run" / recipe / f"{split}.agreement.json"
        results = json.loads(file.read_text())
        assert results["images"] == 20
        assert {"SRCC", "PLCC", "KL", "JS", "Wasserstein"} <= results.keys()


@pytest.mark.slow
def test_recipes_run_with_a_tiny_model(tmp_path):
    """`make recipes-quick`: a few steps of each; about a minute on two cores."""
    run_script(RECIPES / "small.sh", tmp_path / "small")
    for name in ("stage1", "stage2", "full", "lora"):
        assert (tmp_path / "small" / name / "model").is_dir(), name
        assert (tmp_path / "small" / name / "run.json").is_file(), name
