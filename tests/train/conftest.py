"""What tests of training share."""

import pytest

from owl2.train.recipe import Recipe


@pytest.fixture
def make_recipe(tmp_path):
    def make(**settings):
        least = {
            "model": "unused",
            "output": str(tmp_path / "run"),
            "stage": 2,
            "data": [{"dataset": "unused"}],
            "image_size": None,
            "max_steps": 4,
            "batch_size": 4,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-4,
            "gradient_checkpointing": False,
            "workers": 0,
            "log_every": 1,
        }
        return Recipe(**(least | settings))

    return make
