"""The settings of a recipe: the paper's defaults (Specification §2) and conflicts."""

import pytest
from pydantic import ValidationError

from owl2.train.recipe import Recipe

# The table of Specification §2, copied by hand: (stage 1, stage 2).
PAPER = {
    "image_size": (224, 448),
    "max_length": (256, 2048),
    "augment": ("crop_flip", "none"),
    "adam_beta1": (0.9, 0.9),
    "adam_beta2": (0.98, 0.98),
    "adam_epsilon": (1e-6, 1e-6),
    "weight_decay": (0.05, 0.0),
    "max_grad_norm": (1.0, 1.0),
    "learning_rate": (1e-4, 2e-5),
    "min_lr": (1e-6, 1e-7),
    "warmup_steps": (1000, 250),
    "max_steps": (42_500, 4_800),
    "epochs": (None, None),
    "vision_lr_layer_decay": (0.9, 0.9),
    "batch_size": (8192, 256),
    "gradient_checkpointing": (True, True),
}
# Settings that the paper does not determine.
OTHER = {
    "model",
    "output",
    "overwrite",
    "stage",
    "data",
    "dtype",
    "dataloader_num_workers",
    "seed",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "on_invalid_sample",
    "chat_template",
    "image_policy",
    "loss",
    "group_by_length",
    "packing",
    "compile",
    "shuffle_buffer",
    "lora",
    "quantize",
    "freeze",
    "vision_learning_rate",
    "abstractor_learning_rate",
    "attn_implementation",
    "validation",
    "tensorboard",
    "wandb_project",
}
MINIMAL = {"model": "m", "output": "o", "data": [{"dataset": "easy_vqa"}]}


@pytest.mark.parametrize("stage", [1, 2])
def test_defaults_are_those_of_the_paper(stage):
    settings = Recipe(**MINIMAL, stage=stage).model_dump()
    for name, values in PAPER.items():
        assert settings[name] == values[stage - 1], name
    assert settings["gradient_accumulation_steps"] == 1
    assert set(settings) == set(PAPER) | OTHER  # a new setting belongs to one of the two


@pytest.mark.parametrize("stage", [1, 2])
def test_default_dtype_is_bfloat16_where_the_hardware_supports_it(stage, cpu_capabilities):
    recipe = Recipe(**MINIMAL, stage=stage)
    for capability, dtype in (("avx512_f", "float32"), ("avx512_bf16", "bfloat16")):
        cpu_capabilities(**{"avx512_f": True, "avx512_bf16": False, capability: True})
        assert recipe.resolve_dtype("cpu") == dtype
        assert recipe.resolve_dtype("cuda") == "bfloat16"
        assert recipe.resolve_dtype("mps") == "float32"
    assert Recipe(**MINIMAL, stage=stage, dtype="bfloat16").resolve_dtype("cpu") == "bfloat16"


def test_epochs_replace_the_default_max_steps():
    recipe = Recipe(**MINIMAL, stage=2, epochs=1.5)
    assert (recipe.epochs, recipe.max_steps) == (1.5, None)


@pytest.mark.parametrize(
    ("settings", "needles"),
    [
        ({"epochs": 1.0, "max_steps": 5000}, ("`epochs`", "`max_steps`")),
        ({"max_steps": None}, ("`epochs`", "`max_steps`")),
        ({"gradient_accumulation_steps": 3}, ("`gradient_accumulation_steps` (3)",)),
        ({"min_lr": 1.0}, ("`min_lr` (1.0)", "`learning_rate`")),
        ({"max_steps": 250}, ("`warmup_steps` (250, ", "stage 2")),
        ({"max_steps": 9, "warmup_steps": 9}, ("`warmup_steps` (9)",)),
        ({"warmup_steps": 1.5}, ("`warmup_steps` (1.5)",)),
        ({"packing": True, "loss": {}}, ("`packing`", "`loss`")),
        ({"data": [{}]}, ("`dataset`", "`file`", "`hf_dataset`")),
        ({"data": [{"dataset": "a", "file": "b"}]}, ("`dataset`", "`file`")),
        ({"data": [{"file": "a.json", "style": "b"}]}, ("`style`", "`dataset`")),
        ({"data": [{"dataset": "a", "images": "b"}]}, ("`images`", "`file`")),
        ({"data": [{"shards": "a.tar", "images": "b"}]}, ("`images`", "`file`")),
        ({"data": [{"file": "a.json", "count": 2, "weight": 1.0}]}, ("`count`", "`weight`")),
        ({"data": [{"file": "a", "weight": 1.0}, {"file": "b"}]}, ("`weight`",)),
        ({"data": [{"file": "a", "weight": 1.0}], "epochs": 1.0}, ("`weight`", "`max_steps`")),
        ({"data": [{"hf_dataset": "a", "split": "test"}]}, ("`split`",)),
        ({"validation": {"data": [{"file": "a", "weight": 1.0}]}}, ("`weight`",)),
        ({"quantize": "4bit"}, ("`quantize`", "`lora`")),
        ({"packing": True, "group_by_length": True}, ("`packing`", "`group_by_length`")),
        ({"lora": {}, "stage": 1}, ("`lora`", "stage 2")),
        ({"lora": {}, "freeze": ["vision"]}, ("`lora`", "`freeze`")),
        (
            {"lora": {"parts": ["vision"], "modules_to_save": ["vision"]}},
            ("vision", "`parts`", "`modules_to_save`"),
        ),
    ],
)
def test_conflicting_settings_are_refused(settings, needles):
    with pytest.raises(ValidationError) as error:
        Recipe(**(MINIMAL | {"stage": 2} | settings))
    assert all(needle in str(error.value) for needle in needles)
