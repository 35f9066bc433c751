"""What to change in a recipe that does not fit its machine, each change tried by a dry run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from owl2.train.estimate.estimate import Plan, checkpointed
from owl2.train.estimate.memory import Setting, Sharding, dry_run
from owl2.train.recipe import LoraSettings, Recipe


@dataclass(frozen=True)
class Advice:
    """Words for the command line, and the bytes that a device then holds."""

    change: str
    total: int


def advise(plan: Plan) -> list[Advice]:
    """Changes with which a plan that does not fit would, the smallest first; maybe none.

    Activation checkpointing is part of all of them: it costs up to a third of the time, the others
    more or quality. Then smaller pieces of a step; then sharding, LoRA, LoRA on 4 bits, each with
    the largest pieces that fit.
    """
    if plan.fits is not False:
        return []
    return [found for change in _changes(plan) if (found := _tried(*change)) is not None]


def _changes(plan: Plan) -> Iterator[tuple[list[str], Recipe, Setting]]:
    recipe, setting, words = plan.recipe, plan.setting, list[str]()
    if not recipe.gradient_checkpointing:
        some = checkpointed(recipe, "selective")
        yield ["gradient_checkpointing=selective"], some, setting
    if recipe.gradient_checkpointing is not True:
        recipe, words = checkpointed(recipe, True), ["gradient_checkpointing=true"]
    yield words, recipe, setting
    if setting.sharding is Sharding.NONE and setting.machine.devices > 1:
        yield [*words, "--sharding fsdp2"], recipe, replace(setting, sharding=Sharding.FSDP2)
    if recipe.stage == 1 or recipe.quantize is not None:
        return
    if recipe.lora is None:
        recipe, words = (
            recipe.model_copy(update={"lora": LoraSettings.model_validate({})}),
            [*words, "lora={}"],
        )
        yield words, recipe, setting
    quantised = recipe.model_copy(update={"quantize": "4bit"})
    yield [*words, "quantize=4bit"], quantised, setting


def _tried(words: list[str], recipe: Recipe, setting: Setting) -> Advice | None:
    """The recipe with the largest pieces of a step that fit; None if not even one sample does."""
    samples = recipe.batch_size // setting.machine.devices
    now = samples // recipe.gradient_accumulation_steps
    sizes = [size for size in range(now, 0, -1) if samples % size == 0]
    needs = {size: _need(recipe, setting, samples // size) for size in {sizes[0], sizes[-1]}}
    holds = setting.machine.holds
    if not holds(needs[1]):
        return None
    # Memory grows evenly with the samples, so two points show which size to try.
    slope = (needs[now] - needs[1]) / max(1, now - 1)
    for size in sizes:
        if holds(int(needs[1] + slope * (size - 1))):
            need = needs.get(size) or _need(recipe, setting, samples // size)
            if holds(need):
                changed = samples // size
                if changed != recipe.gradient_accumulation_steps:
                    words = [*words, f"gradient_accumulation_steps={changed}"]
                return Advice(" ".join(words), need)
    return None


def _need(recipe: Recipe, setting: Setting, pieces: int) -> int:
    changed = recipe.model_copy(update={"gradient_accumulation_steps": pieces})
    run = dry_run(changed, setting)
    return run.memory(setting.sharding, setting.machine.devices).total
