"""`owl2 plan`: from what is typed to a plan on the terminal and in a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from owl2.data.open_dataset import open_dataset
from owl2.data.webdataset import TarDataset
from owl2.errors import InputError
from owl2.files import atomic_write_text
from owl2.registry import look_up
from owl2.train.estimate.advice import advise
from owl2.train.estimate.estimate import config_of, make_plan
from owl2.train.estimate.hardware import Machine
from owl2.train.estimate.memory import Data, Setting, Sharding
from owl2.train.estimate.report import as_json, show
from owl2.train.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What a user says beside the recipe; see `owl2 plan --help`."""

    gpus: int = 1
    gpu: str | None = None
    gpu_memory: str | None = None
    sharding: str = "none"
    tflops: float | None = None
    tokens: float | None = None
    images: float = 1.0
    samples: int | None = None
    statistics: Path | None = None
    like: str | None = None


def plan_recipe(
    recipe: Recipe, options: Options, console: Console, json_file: Path | None = None
) -> None:
    """Plan a recipe and show it.

    Raises:
        InputError: for options or settings that do not go together, files that cannot be read or
            written.
    """
    machine = Machine.of(options.gpus, options.gpu, options.gpu_memory, options.tflops)
    sharding = look_up("sharding", options.sharding, {str(way): way for way in Sharding})
    if sharding is not Sharding.NONE and machine.devices == 1:
        raise InputError(f"--sharding {sharding} needs several devices: give --gpus")
    samples = counted(recipe) if options.samples is None else options.samples
    data = Data(options.tokens, options.images, samples)
    if options.statistics is not None:
        data = read_statistics(options.statistics, recipe.max_length)
    config, origin = config_of(recipe, options.like)
    with console.status("Tracing a step"):
        plan = make_plan(recipe, Setting(config, machine, sharding, data))
        advice = advise(plan)
    show(console, plan, origin, advice)
    if json_file is not None:
        try:
            atomic_write_text(json_file, json.dumps(as_json(plan, advice), indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{json_file} cannot be written: {error.strerror}") from error
        console.print(f"All numbers are in {json_file}", markup=False)


def counted(recipe: Recipe) -> int | None:
    """Samples an epoch, where they matter and the data is at hand; else None."""
    if recipe.epochs is None:
        return None
    total = 0
    for source in recipe.data:
        path = source.file or source.hf_dataset
        if source.count is None:
            if source.shards is not None or (path is not None and not Path(path).exists()):
                return None
            samples = open_dataset(**source.origin())
            assert not isinstance(samples, TarDataset)
            total += len(samples)
        else:
            total += source.count
    return total


def read_statistics(path: Path, max_length: int) -> Data:
    """Mean lengths and the number of samples, as `owl2 data check` counted them.

    Raises:
        InputError: if the file is none of those.
    """
    try:
        counted: Any = json.loads(path.read_text(encoding="utf-8"))["all"]
        tokens, images = counted["tokens"]["mean"], counted["images"]["mean"]
        return Data(min(float(tokens), max_length), float(images), int(counted["usable"]))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no statistics.json of `owl2 data check`: {error!r}") from error
