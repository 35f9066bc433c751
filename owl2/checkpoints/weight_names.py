"""Names of weights in released files and in the model.

The modules of MAM end with their own names in the model, ``multiway.0.k_proj``, and are named
``k_proj.multiway.0`` in released files. See `owl2.model.modality.Multiway`.
"""

import re
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from owl2.model.registry import MODEL_TYPES

# Modules, and weights that files may lack or that are loaded differently.
HEAD, EMBEDDINGS = "lm_head", "model.embed_tokens"
HEAD_WEIGHT, EMBEDDINGS_WEIGHT = f"{HEAD}.weight", f"{EMBEDDINGS}.weight"
POSITIONS = "model.vision_model.embeddings.position_embedding"

_NAME = "input_layernorm|post_attention_layernorm|k_proj|v_proj|c_attn"
# In regexes of target modules, also a group of names, and any modality.
_GROUP = rf"({_NAME}|\((?:\?:)?(?:\|?(?:{_NAME}))+\))"
_MODALITY = r"([01]|\[01\]|\\d)"
# When loading and saving, transformers renames between released files and modules.
RELEASED_RENAMINGS: list[Any] = [
    WeightRenaming(rf"({_NAME})\.multiway\.{modality}", rf"multiway.{modality}.\1")
    for modality in (0, 1)
]
for name, parts in MODEL_TYPES.items():
    prefixes: list[Any] = [
        # `^` in both, so that saving renames prefixes only. transformers removes it in the target.
        WeightRenaming("^" + re.escape(released), "^" + re.escape(own))
        for released, own in parts.weight_names
    ]
    register_checkpoint_conversion_mapping(name, RELEASED_RENAMINGS + prefixes)


def module_name(name: str) -> str:
    """The name of a module or weight in the model; `name` is a released name or a regex of it."""
    name = _own_prefix(name)
    return re.sub(rf"{_GROUP}(\\?\.)multiway\\?\.{_MODALITY}", r"multiway\2\3\2\1", name)


def released_name(name: str) -> str:
    """Inverse of `module_name`, with the prefixes of the model (`ModelType.weight_names`)."""
    name = _own_prefix(name)
    return re.sub(rf"multiway(\\?\.){_MODALITY}\\?\.{_GROUP}", r"\3\1multiway\1\2", name)


def _own_prefix(name: str) -> str:
    for parts in MODEL_TYPES.values():
        for released, own in parts.weight_names:
            if name.startswith(released):
                return own + name.removeprefix(released)
    return name
