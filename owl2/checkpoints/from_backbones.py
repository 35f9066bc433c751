"""Build an untrained mPLUG-Owl2 from a LLaMA and a CLIP vision tower, or from fresh parts.

    LLaMA weights ──► decoder; norms, K and V once for text, once as the visual copy (SPEC 1.3)
    CLIP weights  ──► vision encoder, q, k and v fused per head (SPEC 1.1)
    fresh         ──► visual abstractor

Because the visual weights start as copies and a text-only step never touches them, text-only
logits are bit-identical to the LLaMA's.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from owl2.checkpoints.load import ACCOUNT_FOR_KEYS, reading, refuse_gaps
from owl2.checkpoints.weight_files import check_weight_files
from owl2.errors import InputError
from owl2.model.configuration import (
    DECODER_SIZES,
    Owl2AbstractorConfig,
    Owl2Config,
    Owl2VisionConfig,
    check_sizes,
)
from owl2.model.modeling import Owl2ForConditionalGeneration

MULTIWAY = re.compile(
    r"(model\.layers\.\d+\.(?:input_layernorm|post_attention_layernorm"
    r"|self_attn\.k_proj|self_attn\.v_proj))\.(weight|bias)"
)
NOT_TAKEN_OVER = {"model_type", "architectures", "transformers_version", "quantization_config"}
FRESH_PARTS = ("model.visual_abstractor.", "model.vision_model.")


def assemble(
    llm: LlamaForCausalLM,
    vision: CLIPVisionModel | dict[str, Any] | None = None,
    *,
    abstractor: dict[str, Any] | None = None,
    image_size: int | None = None,
    use_mam: bool = True,
) -> Owl2ForConditionalGeneration:
    """A LLaMA and a vision encoder as an untrained mPLUG-Owl2, in the LLaMA's dtype.

    Args:
        llm: the language model; its weights are used, not copied, where nothing needs a copy.
        vision: a CLIP tower, or the settings of a fresh ViT (`Owl2VisionConfig`), default ViT-L/14.
        abstractor: settings of the abstractor (`Owl2AbstractorConfig`); its widths default to the
            vision encoder's, its queries to 64.
        image_size: pixels; a tower trained at another size has its positions resized bicubically.
        use_mam: False gives the paper's ablation, one set of weights for both modalities.

    Raises:
        InputError: for a language model that is no LLaMA or parts whose sizes do not fit.
    """
    if not isinstance(llm, LlamaForCausalLM):
        raise InputError(f"the language model must be a LLaMA, this is a {type(llm).__name__}")
    tower = vision if isinstance(vision, CLIPVisionModel) else None
    vision_config = _vision_config(vision, image_size)
    width = vision_config.hidden_size
    defaults = {"hidden_size": width, "encoder_hidden_size": width}
    abstractor_config = Owl2AbstractorConfig(
        **defaults | {"num_attention_heads": vision_config.num_attention_heads} | (abstractor or {})
    )
    config = Owl2Config(
        **{k: v for k, v in llm.config.to_dict().items() if k not in NOT_TAKEN_OVER},
        visual_config={
            "visual_model": vision_config.to_dict(),
            "visual_abstractor": abstractor_config.to_dict(),
        },
        use_mam=use_mam,
    )
    weights = decoder_weights(llm, use_mam)
    if tower is not None:
        weights |= vision_weights(tower)
    model = Owl2ForConditionalGeneration.from_parts(config, weights, llm.dtype, FRESH_PARTS)
    if llm.generation_config is not None:
        model.generation_config = llm.generation_config
    if image_size is not None:
        model.set_image_size(image_size)
    return model


def load_llm(source: str | Path, dtype: torch.dtype | str = "auto") -> LlamaForCausalLM:
    """A LLaMA from a directory, a hub id or a ``.gguf`` file (dequantised).

    Raises:
        InputError: if it cannot be read, or is no LLaMA.
    """
    path = Path(source)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
        # 5.16 always dequantises; later versions keep the blocks unless told.
        if quantised := getattr(transformers, "GgufConfig", None):
            options["quantization_config"] = quantised(dequantize=True)
        dtype = torch.float32 if dtype == "auto" else dtype
    place = path.parent if options else source
    if not options and path.is_dir():
        check_weight_files(path)
    try:
        with reading(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, **options, **ACCOUNT_FOR_KEYS
            )
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # no language model; or gguf is not installed
        raise InputError(f"{source} cannot be loaded as a language model: {error}") from error
    llm, info = loaded
    if not isinstance(llm, LlamaForCausalLM):
        raise InputError(f"{source} is a {llm.config.model_type} model; a LLaMA is needed")
    refuse_gaps(source, info)
    return llm


def random_llm(**settings: Any) -> LlamaForCausalLM:
    """A LLaMA of the given `LlamaConfig` settings with random weights.

    Raises:
        InputError: for settings that no LLaMA can have.
    """
    check_sizes("the language model", settings, (*DECODER_SIZES, "num_key_value_heads"))
    try:
        return LlamaForCausalLM(LlamaConfig(**settings))
    except (StrictDataclassError, KeyError) as error:  # types and heads; an unknown activation
        raise InputError(f"a language model cannot have these settings: {error}") from error


def load_vision(source: str | Path) -> CLIPVisionModel:
    """A CLIP vision tower from a directory or a hub id (whole CLIP models have one).

    Raises:
        InputError: if it cannot be read, or is no CLIP.
    """
    if Path(source).is_dir():
        check_weight_files(Path(source))
    try:
        with reading(source):
            kind = transformers.AutoConfig.from_pretrained(source).model_type
            if kind not in ("clip", "clip_vision_model"):
                raise InputError(f"{source} is a {kind} model; a CLIP tower is needed")
            loaded: Any = CLIPVisionModel.from_pretrained(source, **ACCOUNT_FOR_KEYS)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{source} cannot be loaded as a CLIP tower: {error}") from error
    tower, info = loaded
    refuse_gaps(source, info)
    return tower


def decoder_weights(llm: LlamaForCausalLM, use_mam: bool = True) -> dict[str, torch.Tensor]:
    """A LLaMA's weights under the released names; the visual ones are copies of the text ones."""
    weights = {}
    for name, tensor in llm.state_dict().items():
        match = MULTIWAY.fullmatch(name) if use_mam else None
        if match is None:
            weights[name] = tensor
        else:
            module, kind = match.groups()
            weights[f"{module}.multiway.0.{kind}"] = tensor
            weights[f"{module}.multiway.1.{kind}"] = tensor.clone()
    return weights


def vision_weights(tower: CLIPVisionModel) -> dict[str, torch.Tensor]:
    """A CLIP tower's weights under the released names (SPEC 1.4)."""
    state = {name.removeprefix("vision_model."): t for name, t in tower.state_dict().items()}
    heads, prefix = tower.config.num_attention_heads, "model.vision_model."
    weights = {
        "embeddings.cls_token": state["embeddings.class_embedding"][None, None],
        "embeddings.position_embedding": state["embeddings.position_embedding.weight"][None],
        "embeddings.patch_embed.weight": state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"embeddings.pre_layernorm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        weights[f"post_layernorm.{kind}"] = state[f"post_layernorm.{kind}"]
        for layer in range(tower.config.num_hidden_layers):
            old, new = f"encoder.layers.{layer}.{{}}.{kind}", f"encoder.layers.{layer}.{{}}.{kind}"
            for ours, theirs in (
                ("input_layernorm", "layer_norm1"),
                ("post_attention_layernorm", "layer_norm2"),
                ("self_attn.dense", "self_attn.out_proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                weights[new.format(ours)] = state[old.format(theirs)]
            parts = [state[old.format(f"self_attn.{name}_proj")] for name in "qkv"]
            by_head = [part.unflatten(0, (heads, -1)) for part in parts]  # (h, d, ...)
            fused = torch.stack(by_head, dim=1).flatten(0, 2)  # (h · 3 · d, ...)
            weights[new.format("self_attn.query_key_value")] = fused
    return {prefix + name: tensor for name, tensor in weights.items()}


def _vision_config(
    vision: CLIPVisionModel | dict[str, Any] | None, image_size: int | None
) -> Owl2VisionConfig:
    if not isinstance(vision, CLIPVisionModel):
        settings = dict(vision or {})
        if image_size is not None:
            settings["image_size"] = image_size
        return Owl2VisionConfig(**settings)
    clip = vision.config
    names = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size"
        " num_channels hidden_act attention_dropout"
    )
    # The eps stays the released model's 1e-6, as in the authors' model; CLIP itself has 1e-5.
    return Owl2VisionConfig(**{name: getattr(clip, name) for name in names.split()})
