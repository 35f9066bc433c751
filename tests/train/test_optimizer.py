"""Groups of parameters: rates that fall towards the pixels, decay on matrices only."""

import pytest
import torch
from rich.console import Console

from owl2.train.optimizer import groups_table, make_adamw, parameter_groups
from owl2.train.stages import apply_stage
from tests.tiny import VISION_BLOCKS, make_model

# Written down by hand for three blocks: 0.9 to the power of the levels above.
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
    "model.layers.0.self_attn.k_proj.multiway.1.weight": 1.0,
    "lm_head.weight": 1.0,
}


def groups_of(model):
    return parameter_groups(model, learning_rate=2.0, weight_decay=0.05, vision_layer_decay=0.9)


def group_of(groups, parameter):
    (group,) = [g for g in groups if any(p is parameter for p in g["params"])]
    return group


def test_rates_fall_level_by_level():
    model = make_model()
    groups, parameters = groups_of(model), dict(model.named_parameters())
    for name, scale in SCALES.items():
        assert group_of(groups, parameters[name])["lr"] == pytest.approx(2.0 * scale), name
    assert len({g["lr_scale"] for g in groups}) == VISION_BLOCKS + 2


def test_decay_is_for_matrices_that_are_no_embeddings():
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
def test_every_trainable_parameter_stands_in_one_group(stage, tied):
    model = make_model(tie_word_embeddings=tied)
    apply_stage(model, stage)
    grouped = [id(p) for group in groups_of(model) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_tied_weights_are_an_embedding():
    model = make_model(tie_word_embeddings=True)
    assert group_of(groups_of(model), model.lm_head.weight)["weight_decay"] == 0.0


def test_the_first_group_has_the_full_rate():
    """The Trainer reports the first group's rate as the run's."""
    for stage in (1, 2):
        for use_mam in (True, False):
            model = make_model(use_mam=use_mam)
            apply_stage(model, stage)
            assert groups_of(model)[0]["lr_scale"] == 1.0


def test_adamw_takes_the_groups():
    model = make_model()
    optimizer = make_adamw(groups_of(model), betas=(0.9, 0.98), epsilon=1e-6)
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)


def test_the_table_shows_all_groups():
    model = make_model()
    console = Console(width=120, record=True)
    console.print(groups_table(groups_of(model)))
    text = console.export_text()
    for words in ("vision embeddings", "vision block 2", "abstractor", "0.6561", "0.05"):
        assert words in text
