"""The base class of the models: initialization, and attributes that transformers reads."""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
)

import owl2.checkpoints.peft_targets  # noqa: F401  # registers default target modules
from owl2.checkpoints.load import CheckpointMixin
from owl2.model.configuration import Owl2Config
from owl2.model.vision import VisionAttention, VisionLayer


class Owl2PreTrainedModel(CheckpointMixin, LlamaPreTrainedModel):
    """Initialization and class attributes for transformers; `CheckpointMixin` loads and saves."""

    config_class = Owl2Config
    config: Owl2Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionLayer", "AbstractorLayer"]  # the decoder layer is added on creation
    # `forward` records the decoder's, `get_image_features` the vision encoder's.
    _can_record_outputs = {
        "hidden_states": [LlamaDecoderLayer, VisionLayer],
        "attentions": [LlamaAttention, VisionAttention],
    }

    def __init__(self, config: Owl2Config) -> None:
        requested = config._attn_implementation
        # Selects the default, and replaces what is not installed. Not LlamaModel.__init__, which
        # comes before it in the method resolution order of `Owl2Model` and creates its modules.
        LlamaPreTrainedModel.__init__(self, config)
        visual = config.visual_config
        for part in (visual, *visual.parts.values()):
            if part._attn_implementation in (None, requested):
                part._attn_implementation_internal = config._attn_implementation

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, for all parts: 5.16 does not visit nested configurations."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        visual: Any = self.config._attn_implementation
        if isinstance(attn_implementation, dict):
            visual = attn_implementation.get("visual_config")
        if visual is not None:
            self.config.visual_config._attn_implementation = visual

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_parameters: Any = getattr(module, "init_parameters", None)
        if init_parameters is not None:  # of the vision encoder or the connector
            init_parameters(self.config.initializer_range)
