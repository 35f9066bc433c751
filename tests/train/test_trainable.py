"""The trainable parameters of each stage (Specification §2), by name."""

import re

import pytest
import torch

from owl2.train.trainable import ModelPart, apply_stage, needs_images, part_of
from tests.tiny import make_model
from tests.train.runs import trainable_names

VISUAL_WEIGHTS = re.compile(
    r"model\.layers\.\d+\."
    r"(multiway\.1\.(input|post_attention)_layernorm|self_attn\.multiway\.1\.[kv]_proj)\.weight"
)


def names_of(model):
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def test_stage_1_trains_the_image_path():
    model = make_model()
    apply_stage(model, 1)
    expected = {
        name
        for name in names_of(model)
        if name.startswith(("model.vision_model.", "model.visual_abstractor."))
        or VISUAL_WEIGHTS.fullmatch(name)
    }
    assert trainable_names(model) == expected
    # Two norms, K and V in each of the two layers; all of the abstractor.
    assert sum(bool(VISUAL_WEIGHTS.fullmatch(name)) for name in expected) == 8
    for name in ("query_embeds", "vit_eos", "visual_fc.weight", "visual_fc.bias"):
        assert f"model.visual_abstractor.{name}" in expected
    assert any(name.startswith("model.visual_abstractor.encoder.") for name in expected)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"use_mam": False}, {"tie_word_embeddings": True}, {"attention_bias": True}]
)
def test_trainable_and_frozen_parameters_are_all_parameters(stage, settings):
    model = make_model(**settings)
    params = apply_stage(model, stage)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert params.trainable_size + params.frozen_size == total
    assert (stage == 2) == (trainable_names(model) == names_of(model))


def test_stage_1_without_mam_trains_vision_and_abstractor():
    model = make_model(use_mam=False)
    apply_stage(model, 1)
    assert {part_of(name) for name in trainable_names(model)} == {
        ModelPart.VISION,
        ModelPart.ABSTRACTOR,
    }


@pytest.mark.parametrize(
    ("stage", "freeze", "expected"),
    [(1, [], True), (2, [], False), (2, ["decoder"], True), (2, ["vision", "visual"], False)],
)
def test_only_the_image_path_needs_images(stage, freeze, expected):
    model = make_model()
    apply_stage(model, stage, freeze)
    assert needs_images(model) is expected


def test_stage_replaces_an_earlier_stage():
    model = make_model()
    apply_stage(model, 1)
    apply_stage(model, 2)
    assert trainable_names(model) == names_of(model)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.multiway.1.k_proj.bias", ModelPart.VISUAL_WEIGHTS),
        ("model.layers.11.multiway.1.input_layernorm.weight", ModelPart.VISUAL_WEIGHTS),
        ("model.layers.1.self_attn.multiway.0.k_proj.weight", ModelPart.DECODER),
        ("model.layers.1.self_attn.q_proj.weight", ModelPart.DECODER),
        ("lm_head.weight", ModelPart.DECODER),
    ],
)
def test_part_of_a_parameter(name, part):
    assert part_of(name) is part


@pytest.mark.parametrize(
    "name", ["model.audio.weight", "vision_model.x", "base_model.model.lm_head.weight"]
)
def test_unknown_parameter_is_refused(name):
    with pytest.raises(ValueError, match=name):
        part_of(name)


def test_training_mode_is_deterministic():
    """There is no dropout and no drop path (Specification §2)."""
    model = make_model().train()
    batch = {
        "input_ids": torch.tensor([[1, 40, 40, 40, 5]]),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    assert torch.equal(model(**batch).logits, model(**batch).logits)
