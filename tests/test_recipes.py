"""Every recipe that is shipped can be read, and derives from what it says it does."""

from pathlib import Path

import pytest
import yaml

from owl2.data.datasets import load_dataset
from owl2.train.recipe_file import read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = sorted(
    path for path in RECIPES.rglob("*.yaml") if "output" in yaml.safe_load(path.read_text())
)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe(path):
    recipe = read_recipe(path)
    for source in recipe.data:
        assert source.dataset is not None
        options = source.options | ({"style": source.style} if source.style else {})
        assert len(load_dataset(source.dataset, source.split, **options)) > 0


def test_the_stages_follow_each_other():
    for prefix in ("", "long_"):
        first = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage1.yaml")
        second = read_recipe(RECIPES / "easy_vqa" / f"{prefix}stage2.yaml")
        assert (first.stage, second.stage) == (1, 2)
        assert second.model == f"{first.output}/model"
