"""LoRA training on a base model that may be quantized, and merging of adapters.

LoRA matrices are float32, because small updates need the precision. Frozen weights can take less
memory: bfloat16 where the computation is in bfloat16, or 8 or 4 bits (`quantize`).
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from owl2.checkpoints.adapters import add_lora, find_adapter, lora_parameters, merge_adapter
from owl2.checkpoints.bitsandbytes import bitsandbytes_config
from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.hf_quantizer import StoredDtypeLinear, stored_quantization
from owl2.checkpoints.weight_names import module_name, released_name
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_directory, require_new
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.registry import look_up
from owl2.runtime import DTYPES
from owl2.train.recipe import Recipe
from owl2.train.recipe_sections import LoraSettings
from owl2.train.trainable import TrainableParams, apply_stage, summarize_trainable

MODULES = {
    "decoder": "model.layers",
    "abstractor": "model.visual_abstractor",
    "vision": "model.vision_model",
}
LAYER = re.compile(r"\.layers\.\d+\.")


def loading_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a quantized base model; none without `quantize`.

    Raises:
        InputError: The model is an adapter; bitsandbytes is not installed; or the checkpoint is
            quantized and the recipe has no `lora`, or quantizes it again.
    """
    if find_adapter(recipe.model, {}):
        raise InputError(
            f"model: {recipe.model} is an adapter; training starts from a complete model. Run "
            f"`owl2 merge {recipe.model} --output DIR` and give DIR",
            ErrorCode.UNSUPPORTED,
        )
    require_quantization(recipe, read_config(recipe.model))
    if recipe.quantize is None:
        return {}
    config = bitsandbytes_config(recipe.quantize, _compute_dtype(recipe))
    options: dict[str, Any] = {"quantization_config": config}
    if torch.cuda.is_available():  # a quantized model cannot be moved: one GPU per process
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return options


def is_quantized(recipe: Recipe, config: Any) -> bool:
    """Whether the frozen weights are quantized, by the recipe or in the checkpoint."""
    return recipe.quantize is not None or stored_quantization(config) is not None


def require_quantization(recipe: Recipe, config: Any, is_sharded: bool = False) -> None:
    """Check that a recipe can train a checkpoint whose weights may be quantized.

    Args:
        config: Of the checkpoint.
        is_sharded: Whether FSDP2 or DeepSpeed shards the weights.

    Raises:
        InputError: The checkpoint is quantized and the recipe has no `lora`, or quantizes it again;
            or quantized weights would have to be sharded.
    """
    stored = stored_quantization(config)
    if stored and (recipe.lora is None or recipe.quantize is not None):
        change = "set `lora`" if recipe.lora is None else "remove `quantize`"
        raise InputError(
            f"model: the weights of {recipe.model} are quantized to {stored.bits} bits and cannot "
            f"be trained; {change}",
            ErrorCode.CONFLICT,
        )
    if is_sharded and is_quantized(recipe, config):
        raise InputError(
            "quantize: FSDP2 and DeepSpeed cannot shard quantized weights; use DDP "
            "(recipes/accelerate/ddp.yaml)",
            ErrorCode.CONFLICT,
        )


def prepare_for_training(
    model: PreTrainedModel, recipe: Recipe, autocast: bool = True
) -> TrainableParams:
    """Make the parameters that a recipe trains trainable and freeze all others, in place.

    Args:
        autocast: Whether torch's autocast sets the dtype of the computation. FSDP2 and DeepSpeed
            set it differently.

    Raises:
        InputError: No parameter is trainable, no Linear matches; see `require_quantization`.
    """
    require_quantization(recipe, model.config, is_sharded=not autocast)
    if recipe.lora is None:
        return apply_stage(model, recipe.stage, recipe.freeze)
    trainable = apply_lora(model, recipe.lora, recipe.seed)
    for module in model.modules():
        # On some CPUs bitsandbytes repacks weights at their first use without gradients, i.e. in a
        # validation, and training would continue with wrong products.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain bool
    if autocast and _compute_dtype(recipe) == torch.bfloat16:
        # Only with LoRA, which does not save the frozen weights: the base keeps its precision.
        cast_frozen_to_bf16(model)
    return trainable


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    return DTYPES[recipe.resolve_dtype("cuda" if torch.cuda.is_available() else "cpu")]


def apply_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> TrainableParams:
    """Add LoRA to the model in place; LoRA and `modules_to_save` are then trainable.

    Args:
        seed: Of the random initialization.

    Raises:
        InputError: No Linear matches.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # it is only divided by r
        lora_dropout=settings.lora_dropout,
        target_modules=_target_modules(model, settings),
    )
    modules_to_save = [MODULES[part] for part in settings.modules_to_save]
    with torch.random.fork_rng(devices=[]):  # peft initializes on the CPU
        torch.manual_seed(seed)
        add_lora(model, config, modules_to_save)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for name in modules_to_save:
        model.get_submodule(name).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, StoredDtypeLinear) and module.weight.requires_grad:
            module.restore()
    return summarize_trainable(model)


def cast_frozen_to_bf16(model: nn.Module) -> None:
    """Cast the frozen weights of Linears to bfloat16 in place: half the memory, equal results.

    For computation in bfloat16: autocast casts the weights of a Linear before every product. It
    does not cast norms, embeddings and positions, so these stay in float32.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module in model.modules():
        if type(module) is nn.Linear:
            for parameter in module.parameters(recurse=False):
                # A weight that is used twice is tied to an embedding.
                if not parameter.requires_grad and uses[id(parameter)] == 1:
                    parameter.data = parameter.data.bfloat16()


def _target_modules(model: nn.Module, settings: LoraSettings) -> str:
    """A regular expression that matches exactly the Linears that get LoRA.

    It also matches their released names, so that the authors' model can load the adapter.
    """
    prefixes = tuple(f"{MODULES[part]}." for part in settings.parts)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and name.startswith(prefixes)
    ]
    chosen = set(linears if settings.target_modules is None else ())
    for target in map(module_name, settings.target_modules or ()):
        found = {name for name in linears if f".{target}." in f".{name}."}
        if not found:
            kinds = {name.rsplit(".", 1)[-1] for name in linears}
            raise InputError(
                f"lora.target_modules: {', '.join(settings.parts)} has no Linear {target!r}; the "
                f"names are {', '.join(sorted(kinds))}",
                ErrorCode.UNKNOWN_NAME,
            )
        chosen |= found
    patterns = {r"\.layers\.\d+\.".join(map(re.escape, LAYER.split(name))) for name in chosen}
    return "|".join(sorted(patterns | set(map(released_name, patterns))))


def merge(
    adapter: str | Path, output: str | Path, dtype: str | None = None, base: str | None = None
) -> Path:
    """Merge an adapter into its base model; write a checkpoint in the released layout.

    Args:
        adapter: The model of a run with `lora`: a directory or a hub id.
        output: A directory that does not exist yet.
        dtype: Of the weights: float32, bfloat16 or float16; default: that of the base.
        base: The base model, instead of the one that the adapter names.

    Raises:
        InputError: Not an adapter, no base or a different base; `output` exists or cannot be
            written.
    """
    target = None if dtype is None else look_up("dtype", dtype, DTYPES)
    require_new(output)
    files = find_adapter(adapter, {})
    if files is None:
        raise InputError(
            f"{adapter} is not an adapter: it has no adapter_config.json", ErrorCode.FILE_NOT_FOUND
        )
    # With a dtype the sums are computed in float32 and rounded once.
    model = Owl2ForConditionalGeneration.from_pretrained(
        adapter, dtype="auto" if target is None else torch.float32, base=base
    )
    if stored_quantization(model.config):
        raise InputError(
            f"the base model of {adapter} is quantized; give the unquantized one with --base",
            ErrorCode.UNSUPPORTED,
        )
    merge_adapter(model, files)
    if target is not None:
        model.to(target)
    processor = Owl2Processor.from_pretrained(str(adapter), base=base)
    with atomic_directory(output) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return Path(output)
