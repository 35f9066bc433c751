"""Training with adapters: LoRA where a recipe wants it, on a base that may be quantised; merging.

All LoRA matrices are float32, as small updates need the digits. What stays as it is can be held in
fewer bits: in bfloat16 where the arithmetic is, or rounded to 8 or 4 bits (`quantize`).
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from owl2.checkpoints.adapters import (
    add_lora,
    find_adapter,
    lora_parameters,
    merge_adapter,
)
from owl2.checkpoints.quantization import quantization_config
from owl2.errors import InputError
from owl2.files import atomic_directory, require_writable
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.train.recipe import LoraSettings, Recipe
from owl2.train.trainable import Trained, apply_stage, what_is_trained

PREFIXES = {
    "decoder": "model.layers.",
    "abstractor": "model.visual_abstractor.",
    "vision": "model.vision_model.",
}
LAYER = re.compile(r"\.layers\.\d+\.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def loading_options(recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` is told of a base in 8 or 4 bits; nothing for a whole one.

    Raises:
        InputError: the model is an adapter, or bitsandbytes is not installed.
    """
    if find_adapter(recipe.model, {}):
        raise InputError(
            f"model: {recipe.model} is an adapter, and a run starts from a whole model: make one "
            f"with `owl2 merge {recipe.model} --output DIR`, and give that"
        )
    if recipe.quantize is None:
        return {}
    config = quantization_config(recipe.quantize, _precision(recipe))
    options: dict[str, Any] = {"quantization_config": config}
    if torch.cuda.is_available():  # a quantised model stays where it is loaded: one GPU a process
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return options


def prepare(model: PreTrainedModel, recipe: Recipe, autocast: bool = True) -> Trained:
    """Let exactly what a recipe says be trained, in place; say which.

    Args:
        autocast: whether torch's autocast gives the arithmetic its precision. FSDP2 and DeepSpeed
            have their own ways.

    Raises:
        InputError: nothing is left to train, no Linear is meant, or rounded weights would have to
            be shared out.
    """
    if recipe.quantize is not None and not autocast:
        raise InputError(
            "quantize: FSDP2 and DeepSpeed cannot share out rounded weights; let each process hold "
            "them whole (recipes/accelerate/ddp.yaml)"
        )
    if recipe.lora is None:
        return apply_stage(model, recipe.stage, recipe.freeze)
    trained = adapt(model, recipe.lora, recipe.seed)
    _keep_trainable(model)
    if autocast and _precision(recipe) == torch.bfloat16:
        # Only here, as the frozen weights are not saved: the base keeps its digits.
        hold_frozen_in_bfloat16(model)
    return trained


def _keep_trainable(model: nn.Module) -> None:
    """Let looks at held-out samples leave a 4-bit model as it is.

    On some CPUs bitsandbytes packs weights anew when they are first used without a gradient, and
    the products with such weights have none: after a look, training would go on with wrong ones.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain bool


def _precision(recipe: Recipe) -> torch.dtype:
    return DTYPES[recipe.resolve_dtype("cuda" if torch.cuda.is_available() else "cpu")]


def adapt(model: PreTrainedModel, settings: LoraSettings, seed: int) -> Trained:
    """Put LoRA into the model, in place; let it and the parts in `trained` be trained.

    Args:
        seed: of LoRA's random half.

    Raises:
        InputError: no Linear is meant.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # it is only divided by the rank
        lora_dropout=settings.lora_dropout,
        target_modules=_pattern(_meant(model, settings)),
    )
    whole = [PREFIXES[part].removesuffix(".") for part in settings.modules_to_save]
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        add_lora(model, config, whole)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for part in whole:
        model.get_submodule(part).requires_grad_(True)
    return what_is_trained(model)


def hold_frozen_in_bfloat16(model: nn.Module) -> None:
    """Round the frozen Linears' weights, in place: half the memory, and the same results.

    For training whose arithmetic is bfloat16: torch's autocast rounds a Linear's weights before
    every product. Norms, embeddings and positions it does not, so they stay as they are.
    """
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    used = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    for linear in linears:
        for parameter in linear.parameters(recurse=False):
            tied = used.count(id(parameter)) > 1  # an embedding's numbers, too
            if not parameter.requires_grad and not tied:
                parameter.data = parameter.data.bfloat16()


def _meant(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Names of the Linears that get LoRA."""
    prefixes = tuple(PREFIXES[part] for part in settings.parts)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes)
    ]
    if settings.target_modules is None:
        return linears
    chosen: set[str] = set()
    for word in settings.target_modules:
        found = {name for name in linears if f".{word}." in f".{name}."}
        if not found:
            kinds = sorted({_kind(name) for name in linears})
            raise InputError(
                f"lora.target_modules: no Linear of {', '.join(settings.parts)} is named {word!r}; there "
                f"are {', '.join(kinds)}"
            )
        chosen |= found
    return sorted(chosen)


def _kind(name: str) -> str:
    """A Linear's own name, without that of its modality."""
    return name.split(".multiway.")[0].rsplit(".", 1)[-1]


def _pattern(names: list[str]) -> str:
    """A regular expression for exactly these Linears, in every layer: short, for a file."""
    kinds = {r"\.layers\.\d+\.".join(map(re.escape, LAYER.split(name))) for name in names}
    return "|".join(sorted(kinds))


def merge(
    adapter: str | Path, output: str | Path, dtype: str | None = None, base: str | None = None
) -> Path:
    """Write base model and adapter as one plain checkpoint in the released layout.

    Args:
        adapter: what a run with `adapter` left: a directory or a hub id.
        output: a directory for the checkpoint; must not be there yet.
        dtype: of the weights: float32, bfloat16 or float16; default: as the base has them.
        base: where the base model is, instead of the place that the adapter names.

    Raises:
        InputError: no adapter, no base, another base; `output` is there or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if Path(output).exists():
        raise InputError(f"{output} is there already; give another --output")
    files = find_adapter(adapter, {})
    if files is None:
        raise InputError(f"{adapter} is no adapter: it has no adapter_config.json")
    require_writable(output)
    # Sums are rounded once, to what is asked for; as the base has them nothing is to be rounded.
    model = Owl2ForConditionalGeneration.from_pretrained(
        adapter, dtype="auto" if dtype is None else torch.float32, base=base
    )
    merge_adapter(model, files)
    if dtype is not None:
        model.to(DTYPES[dtype])
    processor = Owl2Processor.from_pretrained(str(adapter))
    with atomic_directory(output) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return Path(output)
