"""Variants of a model that share its weights and use almost no additional memory."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration

VISUAL_PREFIXES = ("model.vision_model.", "model.visual_abstractor.")
TEXT_KEY, VISUAL_KEY = ".multiway.0.", ".multiway.1."


def clone_sharing_weights(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The same model as new modules that share all tensors."""
    config = Owl2Config(**model.config.to_dict())
    return _sharing(model, Owl2ForConditionalGeneration, config, model.state_dict())


def as_no_mam(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The model with its text weights for both modalities, sharing all tensors."""
    config = Owl2Config(**{**model.config.to_dict(), "use_mam": False})
    return _sharing(model, Owl2ForConditionalGeneration, config, _text_weights(model))


def as_llama(model: Owl2ForConditionalGeneration) -> LlamaForCausalLM:
    """The decoder as a LLaMA model of transformers, sharing the text weights."""
    names = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "dtype"}
    options = {key: value for key, value in model.config.to_dict().items() if key in names}
    weights = {
        name: tensor
        for name, tensor in _text_weights(model).items()
        if not name.startswith(VISUAL_PREFIXES)
    }
    return _sharing(model, LlamaForCausalLM, LlamaConfig(**options), weights)


def _text_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(TEXT_KEY, "."): tensor
        for name, tensor in model.state_dict().items()
        if VISUAL_KEY not in name
    }


def _sharing(model: Any, cls: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        variant = cls(config)
    variant.load_state_dict(weights, assign=True)
    return variant.to(model.device).eval()
