"""Estimate the memory, the FLOPs and the time of a recipe (`owl2 plan`).

    recipe, config.json ──► a traced step without data ──► memory per device, FLOPs per step
    devices, GPU, data  ─────────────────────────────────► whether it fits, suggestions, hours

Each sample is assumed to have `max_length` tokens and one image, because the largest batch must
fit. Mean lengths (`SampleStatistics`) change the FLOPs and the token counts.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from owl2.errors import ErrorCode, InputError
from owl2.train.adapters import is_quantized, require_quantization
from owl2.train.estimate.hardware import MIB
from owl2.train.estimate.memory import (
    Sharding,
    TrainingSetup,
    batch_shape,
    prepared_model,
    run_on_meta,
)
from owl2.train.estimate.tracer import BatchShape, MemoryKind, trace_step
from owl2.train.recipe import Recipe
from owl2.train.recipe_sections import Checkpointing, LoraSettings
from owl2.train.trainable import TrainableParams, summarize_trainable

# FLOPs of mean lengths are traced for 100 samples, so that the mean number of images is a fraction.
TRACED_SAMPLES = 100
# Bytes of Python, torch, transformers and the buffers of their kernels.
PROCESS_SIZE = 600 * MIB


@dataclass(frozen=True)
class StepCompute:
    """The computation of an optimizer step on all devices; a multiply-add is two FLOPs.

    Attributes:
        flops: Of the forward and backward passes.
        recomputed_flops: Added by activation checkpointing.
        steps: Of the run; None if it depends on an unknown number of samples.
    """

    samples: int
    text_tokens: float
    image_tokens: float
    images: float
    flops: float
    recomputed_flops: float
    steps: int | None

    @property
    def run_flops(self) -> float | None:
        """FLOPs of the run, recomputation included."""
        return None if self.steps is None else self.steps * (self.flops + self.recomputed_flops)


@dataclass(frozen=True)
class TrainingEstimate:
    """The estimate for a recipe.

    Attributes:
        batch: The micro-batch of a device.
        memory: Of one device, by sharding and gradient checkpointing.
    """

    recipe: Recipe
    setup: TrainingSetup
    trainable: TrainableParams
    batch: BatchShape
    memory: dict[tuple[Sharding, Checkpointing], Counter[MemoryKind]]
    compute: StepCompute

    @property
    def required(self) -> Counter[MemoryKind]:
        """The memory of one device for the recipe as it is."""
        return self.memory[self.setup.sharding, self.recipe.gradient_checkpointing]

    @property
    def fits(self) -> bool | None:
        """Whether the recipe fits on a device; None if its memory is unknown."""
        return self.setup.hardware.fits(self.required.total())

    @property
    def adapter_size(self) -> int | None:
        """Bytes that the trained adapter adds to a server with its base model, in 16 bits.

        None without LoRA. The server has copies of the parts that the adapter stores completely.
        """
        return None if self.recipe.lora is None else 2 * self.trainable.trainable_size

    @property
    def hours(self) -> float | None:
        """Hours of the run; None if its steps or the speed are unknown."""
        flops, speed = self.compute.run_flops, self.setup.hardware.flops_per_second
        return None if flops is None or speed is None else flops / speed / 3600


@dataclass(frozen=True)
class Suggestion:
    """Command-line arguments that make a recipe fit, and the bytes per device with them."""

    change: str
    total: int


def estimate_training(recipe: Recipe, setup: TrainingSetup) -> TrainingEstimate:
    """Estimate a recipe.

    Raises:
        InputError: Conflicting settings, which the trainer would refuse too.
    """
    config, data = setup.config, setup.data
    require_quantization(recipe, config, is_sharded=setup.sharding is not Sharding.NONE)
    recipe.require_context(config.max_position_embeddings)
    image_tokens = math.ceil(data.images) * config.num_image_tokens
    if image_tokens >= recipe.max_length:
        raise InputError(
            f"max_length ({recipe.max_length}) leaves no room for text: the images of a sample "
            f"have {image_tokens} tokens",
            ErrorCode.TOO_LONG,
        )
    least = 1 + data.images * config.num_image_tokens
    if data.tokens is not None and not least <= data.tokens <= recipe.max_length:
        raise InputError(
            f"--tokens is {data.tokens:g}, but must be from {least:g}, with the tokens of images, "
            f"to max_length ({recipe.max_length})",
            ErrorCode.INVALID_VALUE,
        )
    devices, chosen = setup.hardware.devices, setup.sharding
    shardings = [Sharding.NONE]
    if devices > 1 and not is_quantized(recipe, config):
        shardings.append(Sharding.FSDP2 if chosen is Sharding.NONE else chosen)
    memory: dict[tuple[Sharding, Checkpointing], Counter[MemoryKind]] = {}
    flops: dict[Checkpointing, int] = {}
    for mode in dict.fromkeys((True, recipe.gradient_checkpointing, False)):
        variant = _with(recipe, gradient_checkpointing=mode)
        run = run_on_meta(variant, replace(setup, sharding=Sharding.NONE))
        flops[mode] = run.trace.flops.total()
        for sharding in shardings:
            # With ZeRO-3 the model is in 16 bits, and with FSDP2 frozen weights are in float32.
            if sharding is not Sharding.NONE and (sharding is Sharding.ZERO3 or recipe.lora):
                run = run_on_meta(variant, replace(setup, sharding=sharding))
            memory[sharding, mode] = run.memory(sharding, devices) + process_memory(setup)
    trainable = summarize_trainable(prepared_model(recipe, config, half=False))
    compute = _compute(recipe, setup, flops)
    return TrainingEstimate(recipe, setup, trainable, batch_shape(recipe, setup), memory, compute)


def process_memory(setup: TrainingSetup) -> Counter[MemoryKind]:
    """The memory of a process on a CPU before it loads a model. A GPU has its own memory."""
    on_cpu = setup.hardware.device_type == "cpu"
    return Counter({MemoryKind.PROCESS: PROCESS_SIZE} if on_cpu else {})


def _with(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update=changes)


def _compute(recipe: Recipe, setup: TrainingSetup, flops: dict[Checkpointing, int]) -> StepCompute:
    """`flops`: of the micro-batch of a device, by gradient checkpointing."""
    data, steps = setup.data, recipe.max_steps
    batch = recipe.batch_size * (1 + recipe.has_pairs)
    tokens = data.tokens or recipe.max_length
    if data.tokens is None and data.images == 1:
        once = float(flops[False]) * setup.hardware.devices * recipe.gradient_accumulation_steps
    else:
        length = recipe.max_length if recipe.packing else round(tokens)
        rows = max(1, round(TRACED_SAMPLES * tokens / length))
        variant = _with(recipe, gradient_checkpointing=False)
        model = prepared_model(variant, setup.config, half=False)
        trace = trace_step(model, BatchShape(rows, length, round(TRACED_SAMPLES * data.images)))
        once = trace.flops.total() / TRACED_SAMPLES * batch
    if recipe.epochs is not None and data.samples is not None:
        steps = math.ceil(data.samples * recipe.epochs / recipe.batch_size)
    image_tokens = batch * data.images * setup.config.num_image_tokens
    return StepCompute(
        samples=batch,
        text_tokens=batch * tokens - image_tokens,
        image_tokens=image_tokens,
        images=batch * data.images,
        flops=once,
        recomputed_flops=once * (flops[recipe.gradient_checkpointing] / flops[False] - 1),
        steps=steps,
    )


def suggest_changes(estimate: TrainingEstimate) -> list[Suggestion]:
    """Changes that make a recipe fit, the smallest change first; each is verified by a trace.

    All of them include activation checkpointing, which costs up to a third of the time; the others
    cost more time or quality. They are smaller micro-batches, sharding, LoRA and LoRA on 4-bit
    weights, each with the largest micro-batch that fits.
    """
    if estimate.fits is not False:
        return []
    return [found for change in _changes(estimate) if (found := _try(*change)) is not None]


def _changes(estimate: TrainingEstimate) -> Iterator[tuple[list[str], Recipe, TrainingSetup]]:
    recipe, setup, arguments = estimate.recipe, estimate.setup, list[str]()
    if not recipe.gradient_checkpointing:
        selective = _with(recipe, gradient_checkpointing="selective")
        yield ["gradient_checkpointing=selective"], selective, setup
    if recipe.gradient_checkpointing is not True:
        recipe = _with(recipe, gradient_checkpointing=True)
        arguments = ["gradient_checkpointing=true"]
    yield arguments, recipe, setup
    quantized = is_quantized(recipe, setup.config)
    if setup.sharding is Sharding.NONE and setup.hardware.devices > 1 and not quantized:
        yield [*arguments, "--sharding fsdp2"], recipe, replace(setup, sharding=Sharding.FSDP2)
    if recipe.stage == 1 or quantized:
        return
    if recipe.lora is None:
        recipe = _with(recipe, lora=LoraSettings.model_validate({}))
        arguments = [*arguments, "lora={}"]
        yield arguments, recipe, setup
    if setup.sharding is Sharding.NONE:
        yield [*arguments, "quantize=4bit"], _with(recipe, quantize="4bit"), setup


def _try(arguments: list[str], recipe: Recipe, setup: TrainingSetup) -> Suggestion | None:
    """The recipe with the largest micro-batch that fits; None if a single sample does not fit."""
    hardware = setup.hardware
    samples = recipe.batch_size // hardware.devices
    current = samples // recipe.gradient_accumulation_steps

    def required(size: int) -> int:
        run = run_on_meta(_with(recipe, gradient_accumulation_steps=samples // size), setup)
        return (run.memory(setup.sharding, hardware.devices) + process_memory(setup)).total()

    least = required(1)
    if not hardware.fits(least):
        return None
    most = required(current)
    # Memory grows linearly with the samples, so two points show which size to try.
    slope = (most - least) / max(1, current - 1)
    for size in range(current, 0, -1):
        if samples % size or not hardware.fits(int(least + slope * (size - 1))):
            continue
        total = {1: least, current: most}.get(size) or required(size)
        if hardware.fits(total):
            if size != current:
                arguments = [*arguments, f"gradient_accumulation_steps={samples // size}"]
            return Suggestion(" ".join(arguments), total)
    return None
