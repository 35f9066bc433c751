"""Variants of a model that share its weights and use almost no additional memory."""

import re
from collections.abc import Sequence
from typing import Any

from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration

VISUAL_KEY = ".multiway.1."
MODALITY = re.compile(r"\.multiway\.[01]\.")


def clone_sharing_weights(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The same model as new modules that share all tensors."""
    config = type(model.config)(**model.config.to_dict())
    return _sharing(model, Owl2ForConditionalGeneration, config)


def as_no_mam(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The model with its text weights for both modalities, sharing all tensors."""
    return with_separate_modules(model, ())


def with_separate_modules(
    model: Owl2ForConditionalGeneration, names: Sequence[str]
) -> Owl2ForConditionalGeneration:
    """The model with separate weights per modality for the modules `names`, see `Owl2Config`.

    Modules that are shared in the result have the text weights of the model. Visual weights that
    the model does not have are copies of its text weights. All other tensors are those of the
    model.

    Raises:
        InputError: An unknown name, or the model is quantized or has an adapter.
    """
    options = {"use_mam": bool(names), "multiway": bool(names), "mam_modules": list(names) or None}
    known = model.config.to_dict()
    config = type(model.config)(**known | {k: v for k, v in options.items() if k in known})
    return _sharing(model, Owl2ForConditionalGeneration, config)


def as_llama(model: Owl2ForConditionalGeneration) -> LlamaForCausalLM:
    """The decoder as a LLaMA model of transformers, sharing the text weights."""
    names = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "dtype"}
    options = {key: value for key, value in model.config.to_dict().items() if key in names}
    return _sharing(model, LlamaForCausalLM, LlamaConfig(**options))


def _sharing(model: Any, cls: Any, config: Any) -> Any:
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        variant = cls(config)
    state = model.state_dict()
    text = {MODALITY.sub(".", name): t for name, t in state.items() if VISUAL_KEY not in name}

    def tensor(name: str) -> Any:
        if name in state:
            return state[name]
        shared = text[MODALITY.sub(".", name)]
        return shared.clone() if VISUAL_KEY in name else shared

    wanted = variant.state_dict()
    is_quantized = any(name.endswith(".scale") for name in text)
    if is_quantized or not all(MODALITY.sub(".", name) in text for name in wanted):
        raise InputError(
            "a variant needs the plain weights of a model, not quantized ones or an adapter. Merge "
            "an adapter with `owl2 merge`.",
            ErrorCode.UNSUPPORTED,
        )
    variant.load_state_dict({name: tensor(name) for name in wanted}, assign=True)
    return variant.to(model.device).eval()
