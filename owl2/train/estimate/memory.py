"""What one device holds while it trains, by tracing a step of the model as the trainer prepares it.

With N devices:

    none    everything whole on each; with N > 1 DDP, whose buckets hold the gradients once more
    fsdp2   weights, gradients and optimizer states 1/N on each; two layers at a time are gathered
            whole (the one at work and the next), and embeddings and head
    zero3   the same by DeepSpeed, whose model is in 16 bits throughout, its masters in float32
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import nn

from owl2.errors import InputError
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.adapters import prepare
from owl2.train.estimate.hardware import Machine
from owl2.train.estimate.tracer import ACTIVATIONS, Held, Shape, Trace, trace_step
from owl2.train.parallelize import enable_checkpointing
from owl2.train.recipe import Recipe

FLOAT32, HALF = 4, 2
ADAM_STATES = 2  # running means of the gradient and of its square, in float32
# What a rounded number takes, in bytes: itself and its part of its block's scale. In 4 bits, 64
# numbers share a scale of one byte, and 256 scales one in float32; in 8 bits a row shares one.
ROUNDED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


class Sharding(StrEnum):
    """How a model is spread over devices."""

    NONE = "none"
    FSDP2 = "fsdp2"
    ZERO3 = "zero3"


@dataclass(frozen=True)
class Data:
    """What is known of the samples: means of tokens (as computed: images' and padding's, too) and
    of images a sample, and how many there are. None: every sample has `max_length` tokens."""

    tokens: float | None = None
    images: float = 1.0
    samples: int | None = None


@dataclass(frozen=True)
class Setting:
    """What a recipe is planned for: the model that it starts from, devices, data."""

    config: Owl2Config
    machine: Machine
    sharding: Sharding = Sharding.NONE
    data: Data = field(default_factory=Data)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the moment when it holds most.

    Attributes:
        passing: what the backward pass computes again or passes on.
        spread: what sharding itself needs: gathered layers, or the buckets of DDP.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: Mapping[Held, int]
    passing: int
    spread: int
    batch: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.pieces().values())

    def pieces(self) -> dict[str, int]:
        """What it is made of, in the words of tables."""
        return {
            "weights": self.weights,
            "16-bit copies of weights": self.copies,
            "gradients": self.gradients,
            "optimizer states": self.optimizer,
            **{str(kind): size for kind, size in self.activations.items()},
            str(Held.BACKWARD): self.passing,
            "gathered layers, buckets": self.spread,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class DryRun:
    """A step that was traced, and what its memory depends on beside.

    Attributes:
        trained: numbers that are trained.
        saved: bytes that quantised weights take less than those which were traced for them.
        layer: numbers of the largest piece that sharding gathers at a time.
        rest: numbers that stand in no such piece.
        half: whether the arithmetic is in bfloat16.
        sixteen: whether the whole model is.
    """

    trace: Trace
    trained: int
    saved: float
    layer: int
    rest: int
    half: bool
    sixteen: bool

    def memory(self, sharding: Sharding, devices: int) -> Memory:
        """What one of so many devices holds at most."""
        share = 1.0 if sharding is Sharding.NONE else 1 / devices
        scales = {Held.WEIGHTS: share, Held.GRADIENTS: share}
        if sharding is not Sharding.NONE:
            scales[Held.COPIES] = 0.0  # what is gathered is in 16 bits already
        held = self.trace.peak(scales)
        masters = FLOAT32 * self.trained if self.sixteen else 0
        return Memory(
            weights=held[Held.WEIGHTS] + int(share * (masters - self.saved)),
            copies=held[Held.COPIES],
            gradients=held[Held.GRADIENTS],
            optimizer=int(share * ADAM_STATES * FLOAT32 * self.trained),
            activations={kind: held[kind] for kind in ACTIVATIONS},
            passing=held[Held.BACKWARD],
            spread=self._spread(sharding) if devices > 1 else 0,
            batch=held[Held.BATCH],
        )

    def _spread(self, sharding: Sharding) -> int:
        if sharding is Sharding.NONE:
            return FLOAT32 * self.trained
        weights, gradients = self.rest + 2 * self.layer, max(self.rest, self.layer)
        # FSDP2 adds gradients up in float32, of which it makes copies of those in 16 bits.
        sums = FLOAT32 if self.half and sharding is Sharding.FSDP2 else 0
        return (HALF if self.half else FLOAT32) * (weights + gradients) + sums * gradients


def dry_run(recipe: Recipe, setting: Setting) -> DryRun:
    """Trace a step of one device.

    Raises:
        InputError: the batch cannot be shared out.
    """
    half = recipe.resolve_dtype(setting.machine.kind) == "bfloat16"
    sixteen = half and setting.sharding is Sharding.ZERO3
    shape = shape_of(recipe, setting)
    model = prepared_model(recipe, setting.config, half)
    saved, layers = _saved(model, recipe), _layers(model)
    if sixteen:
        model.to(torch.bfloat16)  # type: ignore[arg-type]  # a decorator hides its self
    return DryRun(
        trace=trace_step(model, shape, autocast=half and not sixteen),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        saved=saved,
        layer=max(layers),
        rest=sum(p.numel() for p in model.parameters()) - sum(layers),
        half=half,
        sixteen=sixteen,
    )


def shape_of(recipe: Recipe, setting: Setting) -> Shape:
    """The largest batch that a device computes at a time.

    Raises:
        InputError: the batch cannot be shared out.
    """
    devices, data = setting.machine.devices, setting.data
    pieces = devices * recipe.gradient_accumulation_steps
    if recipe.batch_size % pieces:
        raise InputError(
            f"batch_size ({recipe.batch_size}) must be a multiple of devices x "
            f"gradient_accumulation_steps ({devices} x {recipe.gradient_accumulation_steps})"
        )
    samples = rows = recipe.batch_size // pieces
    if recipe.packing and data.tokens is not None:
        rows = math.ceil(samples * data.tokens / recipe.max_length)
    images = samples * math.ceil(data.images)
    return Shape(rows, recipe.max_length, images, recipe.gradient_accumulation_steps)


def prepared_model(recipe: Recipe, config: Owl2Config, half: bool) -> Owl2ForConditionalGeneration:
    """A model as the trainer has it when the first step begins, on the meta device.

    Args:
        half: whether the arithmetic is in bfloat16.

    Returns:
        the model; the weights that `quantize` rounds are in bfloat16.
    """
    precision = "bfloat16" if half else "float32"
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
        if recipe.image_size is not None:
            model.set_image_size(recipe.image_size)
        # By name, as the default is that of the machine which plans.
        prepare(model, recipe.model_copy(update={"dtype": precision}))
    for linear in _rounded(model, recipe):
        linear.to(torch.bfloat16)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model, recipe.gradient_checkpointing == "selective")
    return model


def _rounded(model: nn.Module, recipe: Recipe) -> list[nn.Linear]:
    """The Linears that `quantize` rounds: those of the decoder's layers."""
    if recipe.quantize is None:
        return []
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith("model.layers.") and ".lora_" not in name
    ]


def _saved(model: nn.Module, recipe: Recipe) -> float:
    """Bytes that rounded weights take less than the bfloat16 ones that are traced for them."""
    if recipe.quantize is None:
        return 0.0
    numbers = sum(linear.weight.numel() for linear in _rounded(model, recipe))
    return numbers * (HALF - ROUNDED[recipe.quantize])


def _layers(model: Owl2ForConditionalGeneration) -> list[int]:
    """The numbers of parameters of the pieces that sharding gathers one by one."""
    names = tuple(model._no_split_modules or ())
    return [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if type(module).__name__ in names
    ]
