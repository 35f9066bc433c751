"""A tiny model for all tests, with a few thousand random parameters."""

import torch

from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration

VISION_BLOCKS = 3
# Settings of a model with one layer per part, for tests whose time depends on the layers.
ONE_LAYER = {
    "num_hidden_layers": 1,
    "vision": {"num_hidden_layers": 1},
    "abstractor": {"num_hidden_layers": 1},
}


def make_config(vocab_size=40, vision=None, abstractor=None, **settings):
    """Grouped-query attention and two queries per image by default."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    visual_model = {
        "hidden_size": 8,
        "num_hidden_layers": VISION_BLOCKS,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
    }
    visual_abstractor = {
        "hidden_size": 8,
        "encoder_hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "num_learnable_queries": 2,
    }
    return Owl2Config(
        vocab_size=vocab_size,
        visual_config={
            "visual_model": visual_model | (vision or {}),
            "visual_abstractor": visual_abstractor | (abstractor or {}),
        },
        **sizes | settings,
    )


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    return Owl2ForConditionalGeneration(make_config(**settings))
