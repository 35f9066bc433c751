"""The memory that one device needs for training, from a traced step of the prepared model.

With N devices:

    none    everything on each device; with N > 1 DDP, whose buckets are a copy of the gradients
    fsdp2   weights, gradients and optimizer states sharded N times; two layers at a time are
            gathered (the current and the next one), and the embeddings and the head
    zero3   the same by DeepSpeed, whose model is in 16 bits, with float32 master weights
"""

import math
import os
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import nn

from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.hf_quantizer import (
    keep_stored_dtype,
    quantize_model,
    stored_quantization,
)
from owl2.memory import require_memory
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.adapters import prepare_for_training
from owl2.train.distributed import DistributedContext
from owl2.train.estimate.hardware import Hardware
from owl2.train.estimate.tracer import (
    BatchShape,
    MemoryKind,
    StepTrace,
    TracedQuantizedLinear,
    trace_step,
)
from owl2.train.parallelize import enable_checkpointing
from owl2.train.recipe import Recipe

FLOAT32, HALF = 4, 2
ADAM_STATES = 2  # running means of the gradient and of its square, in float32
# Bytes per quantized weight with its scales. In 4 bits, 64 weights share a scale of one byte, and
# 256 of these scales share one in float32; in 8 bits a row shares a scale.
QUANTIZED_BYTES: dict[str | None, float] = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


class Sharding(StrEnum):
    """How a model is distributed over devices."""

    NONE = "none"
    FSDP2 = "fsdp2"
    ZERO3 = "zero3"


@dataclass(frozen=True)
class SampleStatistics:
    """Means of the samples: tokens (including image tokens and padding) and images per sample, and
    the number of samples. `tokens` None: every sample has `max_length` tokens."""

    tokens: float | None = None
    images: float = 1.0
    samples: int | None = None


@dataclass(frozen=True)
class TrainingSetup:
    """The inputs of an estimate, without the recipe."""

    config: Owl2Config
    hardware: Hardware
    sharding: Sharding = Sharding.NONE
    data: SampleStatistics = field(default_factory=SampleStatistics)


@dataclass(frozen=True)
class MetaRun:
    """A traced step and the sizes that its memory depends on.

    Attributes:
        trainable: Number of trainable parameters.
        saved: Bytes that quantized weights take less than the traced ones.
        layer: Parameters of the largest module that sharding gathers at a time.
        rest: Parameters outside such modules.
        half: Whether the computation is in bfloat16.
        half_model: Whether the model is in bfloat16.
    """

    trace: StepTrace
    trainable: int
    saved: float
    layer: int
    rest: int
    half: bool
    half_model: bool

    def memory(self, sharding: Sharding, devices: int) -> Counter[MemoryKind]:
        """The bytes on one of `devices` devices at the peak, by kind."""
        share = 1.0 if sharding is Sharding.NONE else 1 / devices
        scales = {MemoryKind.WEIGHTS: share, MemoryKind.GRADIENTS: share}
        if sharding is not Sharding.NONE:
            scales[MemoryKind.COPIES] = 0.0  # gathered weights are in 16 bits already
        peak = self.trace.peak(scales)
        masters = FLOAT32 * self.trainable if self.half_model else 0
        peak[MemoryKind.WEIGHTS] += int(share * (masters - self.saved))
        peak[MemoryKind.OPTIMIZER] = int(share * ADAM_STATES * FLOAT32 * self.trainable)
        if sharding is not Sharding.NONE and devices > 1:
            weights, gradients = self.rest + 2 * self.layer, max(self.rest, self.layer)
            # FSDP2 reduces gradients in float32, so it copies those in 16 bits.
            reduced = FLOAT32 if self.half and sharding is Sharding.FSDP2 else 0
            size = (HALF if self.half else FLOAT32) * (weights + gradients) + reduced * gradients
            peak[MemoryKind.COMMUNICATION] = size
        elif devices > 1:
            peak[MemoryKind.COMMUNICATION] = FLOAT32 * self.trainable
        return peak


def require_training_memory(recipe: Recipe, context: DistributedContext) -> None:
    """Check that the weights, gradients and optimizer states fit into memory, without activations.

    Only the first process of a machine checks, for all of its processes.

    Raises:
        InputError: They do not fit.
    """
    if int(os.environ.get("LOCAL_RANK", "0")):
        return
    half = recipe.resolve_dtype("cpu") == "bfloat16"
    model = prepared_model(recipe, read_config(recipe.model), half, context.sharding is None)
    saved = _saved_by_quantization(model, recipe)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = weights - saved + (1 + ADAM_STATES) * FLOAT32 * trainable
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = processes / context.world_size if context.sharding else processes
    advice = "`owl2 plan RECIPE --gpus 0` shows what it consists of and which changes make it fit."
    require_memory(f"Training {recipe.model}", int(needed * share), advice=advice)


def run_on_meta(recipe: Recipe, setup: TrainingSetup) -> MetaRun:
    """Trace a step of one device.

    Raises:
        InputError: The batch size is not divisible.
    """
    half = recipe.resolve_dtype(setup.hardware.device_type) == "bfloat16"
    half_model = half and setup.sharding is Sharding.ZERO3
    shape = batch_shape(recipe, setup)
    model = prepared_model(recipe, setup.config, half, setup.sharding is Sharding.NONE)
    sharded = tuple(model._no_split_modules or ())
    layers = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if type(module).__name__ in sharded
    ]
    if half_model:
        model.to(torch.bfloat16)  # type: ignore[arg-type]  # a decorator hides its self
    return MetaRun(
        trace=trace_step(model, shape, autocast=half and not half_model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        saved=_saved_by_quantization(model, recipe),
        layer=max(layers),
        rest=sum(p.numel() for p in model.parameters()) - sum(layers),
        half=half,
        half_model=half_model,
    )


def batch_shape(recipe: Recipe, setup: TrainingSetup) -> BatchShape:
    """The largest micro-batch of one device.

    Raises:
        InputError: The batch size is not divisible.
    """
    data = setup.data
    samples = rows = recipe.micro_batch_size(setup.hardware.devices) * (1 + recipe.has_pairs)
    if recipe.packing and data.tokens is not None:
        rows = math.ceil(samples * data.tokens / recipe.max_length)
    images = samples * math.ceil(data.images)
    return BatchShape(rows, recipe.max_length, images, recipe.gradient_accumulation_steps)


def prepared_model(
    recipe: Recipe, config: Owl2Config, half: bool, autocast: bool = True
) -> Owl2ForConditionalGeneration:
    """The model on the meta device, prepared as for the first training step.

    Args:
        half: Whether the computation is in bfloat16.
        autocast: See `prepare_for_training`; False with sharding.

    Returns:
        The model; weights that `quantize` quantizes are in bfloat16.
    """
    dtype = "bfloat16" if half else "float32"
    config = deepcopy(config)
    # Flash attention cannot be traced; it needs as little memory as sdpa.
    config._attn_implementation = "eager" if recipe.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
        if recipe.image_size is not None:
            model.set_image_size(recipe.image_size)
        if stored := stored_quantization(config):
            quantize_model(model, stored, TracedQuantizedLinear)
            halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
            keep_stored_dtype(model, halves)
        # Explicit, because the default dtype is that of this machine, not of the planned one.
        prepare_for_training(model, recipe.model_copy(update={"dtype": dtype}), autocast)
    for linear in _quantized_linears(model, recipe):
        linear.to(torch.bfloat16)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model, recipe.gradient_checkpointing == "selective")
    return model


def _saved_by_quantization(model: nn.Module, recipe: Recipe) -> float:
    """Bytes that the weights of `_quantized_linears` take less than in `model`."""
    quantized = sum(linear.weight.numel() for linear in _quantized_linears(model, recipe))
    return quantized * (HALF - QUANTIZED_BYTES.get(recipe.quantize, HALF))


def _quantized_linears(model: nn.Module, recipe: Recipe) -> list[nn.Linear]:
    """The Linears that `quantize` quantizes: those of the decoder's layers."""
    return [
        module
        for name, module in model.named_modules()
        if recipe.quantize and type(module) is nn.Linear
        if name.startswith("model.layers.") and ".lora_" not in name
    ]
