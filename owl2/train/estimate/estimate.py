"""What a recipe will cost, known beforehand: memory, FLOPs and hours (`owl2 plan`).

    recipe, config.json ──► a step traced without memory ──► memory of a device, FLOPs of a step
    devices, GPU, data  ──────────────────────────────────► a verdict, what to change, hours

Each sample is taken to have `max_length` tokens and an image: what must fit is the worst batch.
Mean lengths (`Data`) change the FLOPs and the counts of tokens.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from owl2.checkpoints.config_file import read_config
from owl2.errors import InputError
from owl2.model.configuration import Owl2Config
from owl2.train.estimate.memory import Memory, Setting, Sharding, dry_run, prepared_model, shape_of
from owl2.train.estimate.tracer import Shape, trace_step
from owl2.train.recipe import Checkpointing, Recipe
from owl2.train.trainable import Trained, what_is_trained

# For FLOPs of mean lengths: many samples at once, so that a share of them can have no image.
MANY = 100


@dataclass(frozen=True)
class Work:
    """What a step computes, on all devices. A multiplication and an addition are two FLOPs.

    Attributes:
        flops: of forward and backward passes.
        recomputed: what activation checkpointing adds to them.
        steps: of the whole run; None if that hangs on how many samples there are.
    """

    samples: int
    text_tokens: float
    image_tokens: float
    images: float
    flops: float
    recomputed: float
    steps: int | None

    @property
    def run_flops(self) -> float | None:
        """FLOPs of the run, with what is computed again."""
        return None if self.steps is None else self.steps * (self.flops + self.recomputed)


@dataclass(frozen=True)
class Plan:
    """All that is known beforehand.

    Attributes:
        batch: what a device computes at a time.
        memory: of one device, by sharding and which activations are computed again.
    """

    recipe: Recipe
    setting: Setting
    trained: Trained
    batch: Shape
    memory: dict[tuple[Sharding, Checkpointing], Memory]
    work: Work

    @property
    def need(self) -> Memory:
        """The memory of one device with the recipe as it is."""
        return self.memory[self.setting.sharding, self.recipe.gradient_checkpointing]

    @property
    def fits(self) -> bool | None:
        """Whether a device has that much; None if its memory is not known."""
        return self.setting.machine.holds(self.need.total)

    @property
    def hours(self) -> float | None:
        """Of the whole run at the machine's speed."""
        flops, speed = self.work.run_flops, self.setting.machine.speed
        return None if flops is None or speed is None else flops / speed / 3600


def make_plan(recipe: Recipe, setting: Setting) -> Plan:
    """Plan a recipe.

    Raises:
        InputError: settings that do not go together, which the trainer would refuse, too.
    """
    _check(recipe, setting)
    devices, chosen = setting.machine.devices, setting.sharding
    ways = [Sharding.NONE]
    if devices > 1:
        ways.append(Sharding.FSDP2 if chosen is Sharding.NONE else chosen)
    memory: dict[tuple[Sharding, Checkpointing], Memory] = {}
    flops: dict[Checkpointing, int] = {}
    for again in dict.fromkeys((True, recipe.gradient_checkpointing, False)):
        run = dry_run(checkpointed(recipe, again), replace(setting, sharding=Sharding.NONE))
        flops[again] = run.trace.all_flops
        for way in ways:
            if way is Sharding.ZERO3:  # another model, in 16 bits
                run = dry_run(checkpointed(recipe, again), setting)
            memory[way, again] = run.memory(way, devices)
    trained = what_is_trained(prepared_model(recipe, setting.config, half=False))
    work = _work(recipe, setting, flops)
    return Plan(recipe, setting, trained, shape_of(recipe, setting), memory, work)


def checkpointed(recipe: Recipe, how: Checkpointing) -> Recipe:
    """The recipe with activation checkpointing, or without."""
    return recipe.model_copy(update={"gradient_checkpointing": how})


def _work(recipe: Recipe, setting: Setting, flops: dict[Checkpointing, int]) -> Work:
    """FLOPs and tokens of a step.

    Args:
        flops: of what a device computes at a time, by which activations are computed again.
    """
    data, batch = setting.data, recipe.batch_size
    tokens = data.tokens or recipe.max_length
    if data.tokens is None and data.images == 1:
        once = float(flops[False]) * setting.machine.devices * recipe.gradient_accumulation_steps
    else:
        once = _mean_flops(recipe, setting, tokens) * batch
    again = once * (flops[recipe.gradient_checkpointing] / flops[False] - 1)
    image_tokens = batch * data.images * setting.config.num_image_tokens
    return Work(
        samples=batch,
        text_tokens=batch * tokens - image_tokens,
        image_tokens=image_tokens,
        images=batch * data.images,
        flops=once,
        recomputed=again,
        steps=_steps(recipe, data.samples),
    )


def _mean_flops(recipe: Recipe, setting: Setting, tokens: float) -> float:
    """FLOPs of a sample of mean length, without any computed again."""
    length = recipe.max_length if recipe.packing else round(tokens)
    rows = max(1, round(MANY * tokens / length))
    model = prepared_model(checkpointed(recipe, False), setting.config, half=False)
    trace = trace_step(model, Shape(rows, length, round(MANY * setting.data.images)))
    return trace.all_flops / MANY


def _steps(recipe: Recipe, samples: int | None) -> int | None:
    """Steps of the run, if they can be known from the recipe."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    counts = [source.count for source in recipe.data if source.count is not None]
    if samples is None and len(counts) == len(recipe.data):
        samples = sum(counts)
    assert recipe.epochs is not None  # a recipe has one or the other
    return None if samples is None else math.ceil(samples * recipe.epochs / recipe.batch_size)


def _check(recipe: Recipe, setting: Setting) -> None:
    config, data = setting.config, setting.data
    context = config.max_position_embeddings
    if recipe.max_length > context:
        raise InputError(
            f"max_length ({recipe.max_length}) is more than the model's {context} positions: set "
            f"max_length to at most {context}"
        )
    room = math.ceil(data.images) * config.num_image_tokens
    if room >= recipe.max_length:
        raise InputError(
            f"max_length ({recipe.max_length}) leaves no room for words beside the {room} tokens "
            "of a sample's images"
        )
    if data.tokens is not None and not 1 <= data.tokens <= recipe.max_length:
        raise InputError(
            f"--tokens is {data.tokens:g}, but a sample has from 1 to {recipe.max_length} tokens "
            "(max_length)"
        )


def config_of(recipe: Recipe, like: str | None) -> tuple[Owl2Config, str]:
    """The configuration to plan with, and where it is from.

    Args:
        like: another checkpoint (a directory or a hub id) of the same sizes.

    Raises:
        InputError: `like`, or the recipe's model if it is there, cannot be read.
    """
    if like is not None:
        return read_config(like), like
    if Path(recipe.model).exists():
        return read_config(recipe.model), recipe.model
    try:
        return read_config(recipe.model), recipe.model
    except InputError:
        # Stage 2 is planned before stage 1 has left its model.
        return Owl2Config(), f"the released sizes, as there is no {recipe.model} yet"
