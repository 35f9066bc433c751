"""The settings of a recipe: the paper's table (SPEC §2), and what a recipe refuses."""

import pytest
import torch
from pydantic import ValidationError

from owl2.train.recipe import Recipe

# SPEC §2's table, written down once more and by hand: (stage 1, stage 2).
TABLE = {
    "image_size": (224, 448),
    "max_length": (256, 2048),
    "augment": ("crop_flip", "none"),
    "adam_beta1": (0.9, 0.9),
    "adam_beta2": (0.98, 0.98),
    "adam_epsilon": (1e-6, 1e-6),
    "weight_decay": (0.05, 0.0),
    "max_grad_norm": (1.0, 1.0),
    "learning_rate": (1e-4, 2e-5),
    "min_learning_rate": (1e-6, 1e-7),
    "warmup_steps": (1000, 250),
    "max_steps": (42_500, 4_800),
    "epochs": (None, None),
    "vision_layer_decay": (0.9, 0.9),
    "batch_size": (8192, 256),
    "gradient_accumulation": (1, 1),
    "gradient_checkpointing": (True, True),
}
# Not the paper's business.
OURS = {
    "model",
    "output",
    "overwrite",
    "stage",
    "data",
    "precision",
    "workers",
    "seed",
    "log_every",
    "save_every",
    "on_bad",
    "group_by_length",
    "packing",
    "compile",
    "shuffle_window",
    "adapter",
    "quantize",
    "frozen",
    "vision_learning_rate",
    "abstractor_learning_rate",
    "attention",
    "validation",
    "tensorboard",
    "wandb",
}
LEAST = {"model": "m", "output": "o", "data": [{"dataset": "easy_vqa"}]}


@pytest.mark.parametrize("stage", [1, 2])
def test_defaults_are_the_papers(stage):
    settings = Recipe(**LEAST, stage=stage).model_dump()
    for name, values in TABLE.items():
        assert settings[name] == values[stage - 1], name
    assert set(settings) == set(TABLE) | OURS  # a new setting must be put in one of them


@pytest.mark.parametrize("stage", [1, 2])
def test_precision_is_the_papers_where_the_hardware_has_it(stage, monkeypatch):
    recipe = Recipe(**LEAST, stage=stage)
    for capable, precision in (("avx512_f", "float32"), ("avx512_bf16", "bfloat16")):
        capabilities = {"avx512_f": True, "avx512_bf16": False, capable: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert recipe.precision_on("cpu") == precision
        assert recipe.precision_on("cuda") == "bfloat16"
        assert recipe.precision_on("mps") == "float32"
    assert Recipe(**LEAST, stage=stage, precision="bfloat16").precision_on("cpu") == "bfloat16"


def test_epochs_take_the_place_of_the_papers_steps():
    recipe = Recipe(**LEAST, stage=2, epochs=1.5)
    assert (recipe.epochs, recipe.max_steps) == (1.5, None)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"epochs": 1.0, "max_steps": 5000}, "either `epochs` or `max_steps`"),
        ({"max_steps": None}, "either `epochs` or `max_steps`"),
        ({"gradient_accumulation": 3}, "multiple of"),
        ({"min_learning_rate": 1.0}, "above `learning_rate`"),
        ({"max_steps": 250}, r"`warmup_steps` \(250, the default of stage 2\) must"),
        ({"max_steps": 9, "warmup_steps": 9}, r"`warmup_steps` \(9\) must"),
        ({"data": [{}]}, "one of `dataset`, `file`"),
        ({"data": [{"dataset": "a", "file": "b"}]}, "one of `dataset`, `file`"),
        ({"data": [{"file": "a.json", "style": "b"}]}, "belongs to a `dataset`"),
        ({"data": [{"dataset": "a", "images": "b"}]}, "`images` belongs to a `file`"),
    ],
)
def test_contradictions_are_refused(settings, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Recipe(**(LEAST | {"stage": 2} | settings))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"data": [{"shards": "a.tar", "images": "b"}]}, "`images` belongs to a `file`"),
        ({"data": [{"file": "a.json", "count": 2, "weight": 1.0}]}, "`count` or `weight`"),
        ({"data": [{"file": "a", "weight": 1.0}, {"file": "b"}]}, "every source a `weight`"),
        ({"data": [{"file": "a", "weight": 1.0}], "epochs": 1.0}, "have no epochs"),
        ({"quantize": "4bit"}, "needs an `adapter`"),
        ({"packing": True, "group_by_length": True}, "no padding"),
        ({"data": [{"table": "a", "split": "test"}]}, "test split"),
    ],
)
def test_settings_of_real_training_that_contradict_each_other(settings, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Recipe(**(LEAST | {"stage": 2} | settings))
