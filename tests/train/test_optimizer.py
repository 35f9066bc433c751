"""Parameter groups: layer-wise learning rate decay in the ViT, weight decay on matrices."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import get_scheduler

from owl2.train.adapters import prepare_for_training
from owl2.train.optimizer import groups_table, make_adamw, parameter_groups, recipe_groups
from owl2.train.trainable import apply_stage
from owl2.train.trainer import training_arguments
from tests.tiny import VISION_BLOCKS, make_model

# Computed by hand for three blocks: 0.9 to the power of the number of levels above.
SCALES = {
    "model.vision_model.embeddings.cls_token": 0.9**4,
    "model.vision_model.embeddings.position_embedding": 0.9**4,
    "model.vision_model.embeddings.patch_embed.weight": 0.9**4,
    "model.vision_model.embeddings.pre_layernorm.weight": 0.9**4,
    "model.vision_model.encoder.layers.0.mlp.fc1.weight": 0.9**3,
    "model.vision_model.encoder.layers.1.mlp.fc1.weight": 0.9**2,
    "model.vision_model.encoder.layers.2.mlp.fc1.weight": 0.9,
    "model.vision_model.post_layernorm.weight": 1.0,
    "model.visual_abstractor.query_embeds": 1.0,
    "model.layers.0.self_attn.multiway.1.k_proj.weight": 1.0,
    "lm_head.weight": 1.0,
}


def groups_of(model):
    return parameter_groups(model, learning_rate=2.0, weight_decay=0.05, vision_lr_layer_decay=0.9)


def group_of(groups, parameter):
    (group,) = [g for g in groups if any(p is parameter for p in g["params"])]
    return group


def test_learning_rates_decay_by_level():
    model = make_model()
    groups, parameters = groups_of(model), dict(model.named_parameters())
    for name, scale in SCALES.items():
        assert group_of(groups, parameters[name])["lr"] == pytest.approx(2.0 * scale), name
    assert len({g["lr_scale"] for g in groups}) == VISION_BLOCKS + 2


def test_weight_decay_applies_to_matrices_except_embeddings():
    model = make_model(attention_bias=True)
    groups = groups_of(model)
    for name, parameter in model.named_parameters():
        free = (
            name.endswith(("bias", "cls_token", "position_embedding", "query_embeds", "vit_eos"))
            or "norm" in name.rsplit(".", 2)[-2]
            or "layernorm.multiway" in name
            or "ffn_ln" in name
            or name == "model.embed_tokens.weight"
        )
        assert group_of(groups, parameter)["weight_decay"] == (0.0 if free else 0.05), name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_is_in_one_group(stage, tied):
    model = make_model(tie_word_embeddings=tied)
    apply_stage(model, stage)
    grouped = [id(p) for group in groups_of(model) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_tied_head_has_no_weight_decay():
    model = make_model(tie_word_embeddings=True)
    assert group_of(groups_of(model), model.lm_head.weight)["weight_decay"] == 0.0


def test_first_group_has_the_full_learning_rate():
    """The Trainer reports the learning rate of the first group."""
    for stage in (1, 2):
        for use_mam in (True, False):
            model = make_model(use_mam=use_mam)
            apply_stage(model, stage)
            assert groups_of(model)[0]["lr_scale"] == 1.0


def test_adamw_updates_the_groups():
    model = make_model()
    optimizer = make_adamw(groups_of(model), betas=(0.9, 0.98), epsilon=1e-6)
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)


def test_table_shows_all_groups():
    model = make_model()
    console = Console(width=120, record=True)
    console.print(groups_table(groups_of(model)))
    text = console.export_text()
    for part in ("vision embeddings", "vision block 2", "abstractor", "0.6561", "0.05"):
        assert part in text


def test_parts_can_have_their_own_learning_rates():
    model = make_model()
    groups = parameter_groups(
        model,
        learning_rate=2.0,
        weight_decay=0.05,
        vision_lr_layer_decay=0.9,
        vision_learning_rate=0.5,
        abstractor_learning_rate=8.0,
    )
    peaks = {
        "lm_head.weight": 2.0,
        "model.layers.1.self_attn.multiway.1.v_proj.weight": 2.0,
        "model.visual_abstractor.visual_fc.weight": 8.0,
        "model.visual_abstractor.vit_eos": 8.0,
        "model.vision_model.post_layernorm.bias": 0.5,
        "model.vision_model.encoder.layers.2.mlp.fc1.weight": 0.5 * 0.9,
        "model.vision_model.embeddings.cls_token": 0.5 * 0.9**4,
    }
    parameters = dict(model.named_parameters())
    for name, peak in peaks.items():
        assert group_of(groups, parameters[name])["lr"] == pytest.approx(peak), name
    assert groups[0]["lr"] == 2.0
    assert [g["lr"] for g in groups] == pytest.approx([2.0 * g["lr_scale"] for g in groups])


def test_schedule_scales_all_groups_by_the_same_factor(make_recipe):
    """From the peaks of the recipe to the minimum, with the schedule of the Trainer."""
    recipe = make_recipe(
        learning_rate=1e-2,
        min_lr=1e-3,
        vision_learning_rate=4e-3,
        abstractor_learning_rate=3e-2,
        warmup_steps=2,
        max_steps=10,
    )
    model = make_model()
    groups = recipe_groups(model, recipe)
    peaks = [group["lr"] for group in groups]
    assert {1e-2, 3e-2, 4e-3} <= set(peaks)
    optimizer = make_adamw(groups, betas=(0.9, 0.98), epsilon=1e-6)
    arguments = training_arguments(recipe, Path("unused"), recipe.max_steps)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=recipe.warmup_steps,
        num_training_steps=recipe.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    reached = []
    for _ in range(recipe.max_steps):
        optimizer.step()
        schedule.step()
        reached.append(schedule.get_last_lr())
    assert reached[1] == pytest.approx(peaks)
    assert reached[-1] == pytest.approx([0.1 * peak for peak in peaks])


@pytest.mark.parametrize("settings", [{"lora": {"r": 2}}, {"stage": 1}, {"freeze": ["vision"]}])
def test_table_counts_every_trainable_parameter_once(make_recipe, settings):
    recipe = make_recipe(**settings)
    model = make_model()
    trained = prepare_for_training(model, recipe)
    table = groups_table(recipe_groups(model, recipe))
    counts = [int(cell.replace(",", "")) for cell in table.columns[-1].cells]
    assert sum(counts) == trained.trainable_size
