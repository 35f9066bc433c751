"""Reads backbones and converts their weights, for `CheckpointMixin.from_backbones`.

LLaMA weights ──► decoder; norms, K and V for text, and a copy for images (Specification §1.3)
CLIP weights  ──► vision encoder; q, k and v fused per head (Specification §1.1)
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from owl2.checkpoints.key_report import REPORT_KEYS, check_loading_info, translate_load_errors
from owl2.checkpoints.weight_files import complete_index, read_tensors, weight_files
from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import (
    DECODER_SIZES,
    VISUAL_SIZES,
    Owl2AbstractorConfig,
    Owl2Config,
    Owl2VisionConfig,
    check_sizes,
)

LAYER_WEIGHT = re.compile(r"(model\.layers\.\d+\.(?:self_attn\.)?(\w+))\.(weight|bias)")
NOT_COPIED = {"model_type", "architectures", "transformers_version", "quantization_config"}
# Options of a CLIP tower; the eps stays the released model's 1e-6, as in the authors' model.
CLIP_OPTIONS = (
    *VISUAL_SIZES,
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_act",
    "attention_dropout",
)
# Modules of a vision layer here and in CLIP.
CLIP_MODULES = {
    "input_layernorm": "layer_norm1",
    "post_attention_layernorm": "layer_norm2",
    "self_attn.dense": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def load_llm(source: str | Path, dtype: torch.dtype | str = "auto") -> LlamaForCausalLM:
    """Load a LLaMA from a directory, a hub id or a ``.gguf`` file (dequantized).

    Raises:
        InputError: It cannot be read, or is not a LLaMA.
    """
    path, options = Path(source), dict[str, Any]()
    name: str | Path = source
    if path.suffix == ".gguf":
        name, options["gguf_file"] = path.parent, path.name
        # 5.16 always dequantizes; later versions do so on request.
        if gguf_config := getattr(transformers, "GgufConfig", None):
            options["quantization_config"] = gguf_config(dequantize=True)
        dtype = torch.float32 if dtype == "auto" else dtype
    return _load(source, LlamaForCausalLM, ["llama"], name, dtype=dtype, **options)


def random_llm(**options: Any) -> LlamaForCausalLM:
    """A LLaMA with random weights and the given options of `LlamaConfig`.

    Raises:
        InputError: An option is invalid.
    """
    check_sizes("language_model", options, (*DECODER_SIZES, "num_key_value_heads"))
    try:
        return LlamaForCausalLM(LlamaConfig(**options))
    except (StrictDataclassError, KeyError) as error:  # types and heads; an unknown activation
        raise InputError(
            f"invalid options of the language model: {error}", ErrorCode.INVALID_CONFIG
        ) from error


def load_vision(source: str | Path) -> CLIPVisionModel:
    """Load a CLIP vision tower from a directory or a hub id (also of a complete CLIP model).

    Raises:
        InputError: It cannot be read, or is not a CLIP.
    """
    return _load(source, CLIPVisionModel, ["clip", "clip_vision_model"], source)


def _load(source: str | Path, cls: Any, kinds: list[str], name: str | Path, **options: Any) -> Any:
    """Load a backbone from `name`, whose `model_type` is one of `kinds`, with all its keys."""
    gguf_file = options.get("gguf_file")
    if Path(name).is_dir() and gguf_file is None:
        for file in weight_files(Path(name)):
            read_tensors(file)
    try:
        with translate_load_errors(source):
            kind = AutoConfig.from_pretrained(name, gguf_file=gguf_file).model_type
            if kind not in kinds:
                raise _wrong_kind(source, kind, cls)
            with complete_index(name, True, {}) as folder:
                model, info = cls.from_pretrained(folder, **options, **REPORT_KEYS)
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # an unknown kind of model; gguf is not installed
        raise InputError(
            f"{source} cannot be loaded as a {cls.__name__}: {error}", ErrorCode.UNREADABLE_FILE
        ) from error
    check_loading_info(source, {**info, "unexpected_keys": []})
    return model


def _wrong_kind(source: str | Path, kind: str, expected: type) -> InputError:
    return InputError(
        f"{source} is a {kind} model; expected a {expected.__name__}", ErrorCode.UNSUPPORTED
    )


def backbone_config(
    llm: LlamaForCausalLM,
    vision: CLIPVisionModel | dict[str, Any] | None,
    abstractor: dict[str, Any] | None,
    image_size: int | None,
    **mam: Any,
) -> Owl2Config:
    """The configuration of a model from backbones; see `CheckpointMixin.from_backbones`.

    `mam` are the options `use_mam` and `mam_modules` of `Owl2Config`.
    """
    if not isinstance(llm, LlamaForCausalLM):
        raise _wrong_kind("the language model", type(llm).__name__, LlamaForCausalLM)
    if isinstance(vision, CLIPVisionModel):
        options = {name: getattr(vision.config, name) for name in CLIP_OPTIONS}
    else:
        options = dict(vision or {})
        if image_size is not None:
            options["image_size"] = image_size
    vision_config = Owl2VisionConfig(**options)
    width = vision_config.hidden_size
    defaults = {
        "hidden_size": width,
        "encoder_hidden_size": width,
        "num_attention_heads": vision_config.num_attention_heads,
    }
    abstractor_config = Owl2AbstractorConfig(**defaults | (abstractor or {}))
    return Owl2Config(
        **{k: v for k, v in llm.config.to_dict().items() if k not in NOT_COPIED},
        visual_config={
            "visual_model": vision_config.to_dict(),
            "visual_abstractor": abstractor_config.to_dict(),
        },
        **mam,
    )


def backbone_weights(
    llm: LlamaForCausalLM,
    vision: CLIPVisionModel | dict[str, Any] | None,
    separate_modules: Collection[str],
) -> dict[str, torch.Tensor]:
    """The weights of the backbones under the released names (Specification §1.4).

    The visual weights of the decoder are copies of its text weights. `separate_modules` are those
    of `Owl2Config`.
    """
    weights = {}
    for name, tensor in llm.state_dict().items():
        match = LAYER_WEIGHT.fullmatch(name)
        if match is None or match[2] not in separate_modules:
            weights[name] = tensor
        else:
            module, _, kind = match.groups()
            weights[f"{module}.multiway.0.{kind}"] = tensor
            weights[f"{module}.multiway.1.{kind}"] = tensor.clone()
    return weights | (_vision_weights(vision) if isinstance(vision, CLIPVisionModel) else {})


def _vision_weights(tower: CLIPVisionModel) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("vision_model."): t for name, t in tower.state_dict().items()}
    heads = tower.config.num_attention_heads
    weights = {
        "embeddings.cls_token": state["embeddings.class_embedding"][None, None],
        "embeddings.position_embedding": state["embeddings.position_embedding.weight"][None],
        "embeddings.patch_embed.weight": state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"embeddings.pre_layernorm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        weights[f"post_layernorm.{kind}"] = state[f"post_layernorm.{kind}"]
        for index in range(tower.config.num_hidden_layers):
            layer = f"encoder.layers.{index}"
            for own, clip in CLIP_MODULES.items():
                weights[f"{layer}.{own}.{kind}"] = state[f"{layer}.{clip}.{kind}"]
            parts = [state[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            by_head = [part.unflatten(0, (heads, -1)) for part in parts]  # (h, d, ...)
            fused = torch.stack(by_head, dim=1).flatten(0, 2)  # (h · 3 · d, ...)
            weights[f"{layer}.self_attn.query_key_value.{kind}"] = fused
    return {f"model.vision_model.{name}": tensor for name, tensor in weights.items()}
