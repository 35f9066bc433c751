"""`owl2 plan`: from the options to an estimate on the terminal and in a JSON file."""

import json
from pathlib import Path

from rich.console import Console

from owl2.data.open_dataset import open_dataset
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text
from owl2.registry import look_up
from owl2.train.estimate.estimate import estimate_training, find_config, suggest_changes
from owl2.train.estimate.hardware import Hardware
from owl2.train.estimate.memory import SampleStatistics, Sharding, TrainingSetup
from owl2.train.estimate.report import as_json, show
from owl2.train.recipe import Recipe


def plan_recipe(
    recipe: Recipe,
    hardware: Hardware,
    console: Console,
    *,
    sharding: str = "none",
    data: SampleStatistics | None = None,
    config_from: str | None = None,
    output_file: Path | None = None,
) -> None:
    """Estimate a recipe, print the estimate, and write it to `output_file` as JSON.

    Args:
        data: Without a number of samples it is counted, if the recipe's data is present.
        config_from: A checkpoint with the model's sizes, if the recipe's model does not exist yet.

    Raises:
        InputError: Conflicting options or settings, or files that cannot be read or written.
    """
    chosen = look_up("sharding", sharding, {str(kind): kind for kind in Sharding})
    if chosen is not Sharding.NONE and hardware.devices == 1:
        raise InputError(
            f"--sharding {sharding} needs several devices: give --gpus", ErrorCode.CONFLICT
        )
    data = data or SampleStatistics()
    if data.samples is None:
        data = SampleStatistics(data.tokens, data.images, count_samples(recipe))
    config, origin = find_config(recipe, config_from)
    with console.status("Tracing a step"):
        estimate = estimate_training(recipe, TrainingSetup(config, hardware, chosen, data))
        suggestions = suggest_changes(estimate)
    show(console, estimate, origin, suggestions)
    if output_file is not None:
        atomic_write_text(output_file, json.dumps(as_json(estimate, suggestions), indent=2) + "\n")
        console.print(f"All figures are in {output_file}", markup=False)


def count_samples(recipe: Recipe) -> int | None:
    """Samples per epoch; None if the recipe needs no such number or the data is not present."""
    if recipe.epochs is None:
        return None
    total = 0
    for source in recipe.data:
        path = source.file or source.hf_dataset
        if source.count is not None:
            total += source.count
        elif source.shards is not None or (path is not None and not Path(path).exists()):
            return None
        else:
            total += len(open_dataset(**source.origin()))  # type: ignore[arg-type]  # not shards
    return total


def read_statistics(path: Path, max_length: int) -> SampleStatistics:
    """Read the mean lengths and the number of samples from `statistics.json` of `owl2 data check`.

    Raises:
        InputError: The file cannot be read, or is not such a file.
    """
    try:
        counted = json.loads(path.read_text(encoding="utf-8"))["all"]
        tokens, images = counted["tokens"]["mean"], counted["images"]["mean"]
        return SampleStatistics(
            min(float(tokens), max_length), float(images), int(counted["usable"])
        )
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}", ErrorCode.UNREADABLE_FILE
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a statistics.json of `owl2 data check`: {error!r}",
            ErrorCode.INVALID_FORMAT,
        ) from error
