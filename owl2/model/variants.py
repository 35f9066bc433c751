"""Relatives of a model that share its weights, so that they cost no memory but their own code."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration

VISUAL_PARTS = ("model.vision_model.", "model.visual_abstractor.")
TEXT_KEY, VISUAL_KEY = ".multiway.0.", ".multiway.1."


def clone_sharing_weights(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The same model in modules of its own, sharing all its tensors."""
    config = Owl2Config(**model.config.to_dict())
    return _sharing(model, Owl2ForConditionalGeneration, config, model.state_dict())


def as_no_mam(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The same model with the text weights for both modalities, sharing all its tensors."""
    config = Owl2Config(**{**model.config.to_dict(), "use_mam": False})
    return _sharing(model, Owl2ForConditionalGeneration, config, _text_weights(model))


def as_llama(model: Owl2ForConditionalGeneration) -> LlamaForCausalLM:
    """The decoder as transformers' own LLaMA, sharing the text weights."""
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "dtype"}
    settings = {key: value for key, value in model.config.to_dict().items() if key in known}
    weights = {
        name: tensor
        for name, tensor in _text_weights(model).items()
        if not name.startswith(VISUAL_PARTS)
    }
    return _sharing(model, LlamaForCausalLM, LlamaConfig(**settings), weights)


def _text_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(TEXT_KEY, "."): tensor
        for name, tensor in model.state_dict().items()
        if VISUAL_KEY not in name
    }


def _sharing(model: Any, cls: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        relative = cls(config)
    relative.load_state_dict(weights, assign=True)
    return relative.to(model.device).eval()
