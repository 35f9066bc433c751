"""Each stage trains what SPEC §2 says, told by name."""

import re

import pytest
import torch

from owl2.train.trainable import STAGES, ModelPart, apply_stage, part_of
from tests.tiny import make_model

VISUAL_WEIGHTS = re.compile(
    r"model\.layers\.\d+\."
    r"(input_layernorm|post_attention_layernorm|self_attn\.[kv]_proj)\.multiway\.1\.weight"
)


def names_of(model):
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def trained_names(model):
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.requires_grad}


def test_stage_1_trains_the_image_side():
    model = make_model()
    trained = apply_stage(model, 1)
    expected = {
        name
        for name in names_of(model)
        if name.startswith(("model.vision_model.", "model.visual_abstractor."))
        or VISUAL_WEIGHTS.fullmatch(name)
    }
    assert trained_names(model) == expected == set(trained.trainable)
    # Every kind is there: two norms, K and V in each of the two layers; all of the abstractor.
    assert sum(bool(VISUAL_WEIGHTS.fullmatch(name)) for name in expected) == 8
    for name in ("query_embeds", "vit_eos", "visual_fc.weight", "visual_fc.bias"):
        assert f"model.visual_abstractor.{name}" in expected
    assert any(name.startswith("model.visual_abstractor.encoder.") for name in expected)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"use_mam": False}, {"tie_word_embeddings": True}, {"attention_bias": True}]
)
def test_trained_and_frozen_are_all(stage, settings):
    model = make_model(**settings)
    trained = apply_stage(model, stage)
    assert set(trained.trainable) | set(trained.frozen) == names_of(model)
    assert not set(trained.trainable) & set(trained.frozen)
    assert trained_names(model) == set(trained.trainable)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert trained.trainable_size + trained.frozen_size == numbers
    assert (stage == 2) == (not trained.frozen)


def test_without_mam_stage_1_trains_vision_and_abstractor_only():
    model = make_model(use_mam=False)
    trained = apply_stage(model, 1)
    assert {part_of(name) for name in trained.trainable} == {ModelPart.VISION, ModelPart.ABSTRACTOR}


def test_a_stage_undoes_the_one_before():
    model = make_model()
    apply_stage(model, 1)
    apply_stage(model, 2)
    assert trained_names(model) == names_of(model)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.k_proj.multiway.1.bias", ModelPart.VISUAL_WEIGHTS),
        ("model.layers.11.input_layernorm.multiway.1.weight", ModelPart.VISUAL_WEIGHTS),
        ("model.layers.1.self_attn.k_proj.multiway.0.weight", ModelPart.DECODER),
        ("model.layers.1.self_attn.q_proj.weight", ModelPart.DECODER),
        ("lm_head.weight", ModelPart.DECODER),
    ],
)
def test_parts_are_told_step_by_step(name, part):
    assert part_of(name) is part


@pytest.mark.parametrize(
    "name", ["model.audio.weight", "vision_model.x", "base_model.model.lm_head.weight"]
)
def test_a_name_nobody_decided_on_is_refused(name):
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of(name)


def test_nothing_is_dropped_at_random():
    """SPEC §2: drop path 0. In training, too, the same input gives the same output."""
    model = make_model().train()
    batch = {
        "input_ids": torch.tensor([[1, 40, 40, 40, 5]]),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_there_is_no_stage_3():
    assert set(STAGES) == {1, 2}
    with pytest.raises(ValueError, match="not 3"):
        apply_stage(make_model(), 3)
