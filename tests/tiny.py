"""A tiny model for all tests, with a few thousand random parameters."""

import torch

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.registry import DEFAULT_MODEL_TYPE, MODEL_TYPES

VISION_BLOCKS = 3
# Sizes of a CLIP tower, for models from backbones.
CLIP_TOWER = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
# Settings of a model with one layer per part, for tests whose time depends on the layers.
ONE_LAYER = {
    "num_hidden_layers": 1,
    "vision": {"num_hidden_layers": 1},
    "abstractor": {"num_hidden_layers": 1},
}


# Sizes that the CPU kernels support.
KERNELS = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 80}
# Some of the modules of MAM have weights for each modality.
PARTIAL_MAM = [
    {"mam_modules": ["input_layernorm", "post_attention_layernorm"]},
    {"mam_modules": ["k_proj", "v_proj"]},
    {"mam_modules": ["post_attention_layernorm", "v_proj"]},
]
# Model types with one image for each image token, so that all have the same inputs.
MEMBERS = ("mplug_owl2", "mplug_owl2_1", "mplug_docowl")


def make_config(vocab_size=40, vision=None, abstractor=None, member=DEFAULT_MODEL_TYPE, **settings):
    """Grouped-query attention and two queries per image by default.

    `member` is a model type. DocOwl1.5 and DocOwl2 also have two embeddings and an end token per
    image.
    """
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
    visual_config = {
        "visual_model": visual_model | (vision or {}),
        "visual_abstractor": visual_abstractor | (abstractor or {}),
    }
    if member in ("mplug_docowl", "mplug_docowl2"):
        del visual_config["visual_abstractor"]
        visual_config["visual_hreducer"] = {"hidden_size": 8, "conv_shape": "1x2"}
    if member == "mplug_docowl2":
        width = (sizes | settings)["hidden_size"]
        visual_config["visual_hrcompressor"] = {
            "high_reso_cross_hid_size": width,
            "high_reso_cross_num_att_heads": 2,
            "layer": 1,
        }
    if member == "mplug_owl2_1":  # twice the inner width; keys and values for each head
        del sizes["num_key_value_heads"]
        sizes |= {"intermediate_size": 48, "kv_channels": 4}
    make = MODEL_TYPES[member].load("config")
    return make(vocab_size=vocab_size, visual_config=visual_config, **sizes | settings)


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    return Owl2ForConditionalGeneration(make_config(**settings))
