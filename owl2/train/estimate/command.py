"""`owl2 plan`: from the options to an estimate as tables with a verdict, and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from owl2.checkpoints.config_file import read_config
from owl2.data.open_dataset import open_dataset
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_json, require_writable
from owl2.json_records import json_object
from owl2.model.configuration import Owl2Config
from owl2.registry import look_up
from owl2.train.estimate.estimate import (
    Suggestion,
    TrainingEstimate,
    estimate_training,
    suggest_changes,
)
from owl2.train.estimate.hardware import DEFAULT_MFU, GIB, MIB, USABLE_FRACTION, Hardware
from owl2.train.estimate.memory import SampleStatistics, Sharding, TrainingSetup
from owl2.train.estimate.tracer import MemoryKind
from owl2.train.recipe import Recipe
from owl2.train.recipe_sections import Checkpointing
from owl2.train.trainable import numeric_table

CHECKPOINTING: dict[Checkpointing, str] = {True: "", "selective": "selective ", False: "no "}


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
            f"--sharding {sharding} needs several devices: set --gpus", ErrorCode.CONFLICT
        )
    if output_file is not None:
        require_writable(output_file)
    data = data or SampleStatistics()
    if data.samples is None:
        data = replace(data, samples=count_samples(recipe))
    config, origin = find_config(recipe, config_from)
    with console.status("Tracing a step"):
        estimate = estimate_training(recipe, TrainingSetup(config, hardware, chosen, data))
        suggestions = suggest_changes(estimate)
    for table in _tables(estimate, origin):
        console.print(table)
        console.print()
    for line in _verdict(estimate, suggestions):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if output_file is not None:
        atomic_write_json(output_file, _as_json(estimate, suggestions))
        console.print(f"All figures are in {output_file}", markup=False)


def find_config(recipe: Recipe, config_from: str | None) -> tuple[Owl2Config, str]:
    """The model configuration of an estimate, and its origin.

    Args:
        config_from: Another checkpoint (a directory or a hub id) with the same sizes.

    Raises:
        InputError: `config_from`, or the recipe's model if it exists, cannot be read.
    """
    name = config_from or recipe.model
    try:
        return read_config(name), name
    except InputError:
        if config_from is not None or Path(recipe.model).exists():
            raise
        # Stage 2 is planned before stage 1 has written its model.
        return Owl2Config(), f"the released sizes; {recipe.model} does not exist yet"


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
    content = json_object(path).value
    try:
        counted = content["all"]
        tokens = min(float(counted["tokens"]["mean"]), max_length)
        return SampleStatistics(tokens, float(counted["images"]["mean"]), int(counted["usable"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a statistics.json of `owl2 data check`: {error!r}",
            ErrorCode.INVALID_FORMAT,
        ) from error


def _tables(estimate: TrainingEstimate, origin: str) -> Iterator[Table]:
    compute, hardware = estimate.compute, estimate.setup.hardware
    yield estimate.trainable.table(f"Parameters ({origin})")
    chosen = (estimate.setup.sharding, estimate.recipe.gradient_checkpointing)
    titles, columns = [], list(estimate.memory.values())
    for sharding, mode in estimate.memory:
        way = "unsharded" if sharding is Sharding.NONE else sharding
        title = f"{way}, {CHECKPOINTING[mode]}checkpointing"
        titles.append(f"[bold]{title} ◄[/bold]" if (sharding, mode) == chosen else title)
    unit, name = _unit(max(column.total() for column in columns))
    table = numeric_table(f"Memory per device ({hardware.title}), in {name}", "", *titles)
    for kind in MemoryKind:
        if any(column[kind] for column in columns):
            table.add_row(kind, *(f"{column[kind] / unit:,.2f}" for column in columns))
    table.add_section()
    table.add_row("peak", *(f"{column.total() / unit:,.2f}" for column in columns))
    yield table

    steps = compute.steps
    table = numeric_table(
        "Computation", "", "per step", f"run ({steps:,} steps)" if steps else "run"
    )
    for name, count, digits in (
        ("samples", compute.samples, ",.0f"),
        ("images", compute.images, ",.0f"),
        ("text tokens", compute.text_tokens, ",.0f"),
        ("image tokens", compute.image_tokens, ",.0f"),
        ("FLOPs, forward and backward", compute.flops, ".3g"),
        ("FLOPs, recomputation", compute.recomputed_flops, ".3g"),
    ):
        table.add_row(name, f"{count:{digits}}", f"{count * steps:{digits}}" if steps else "?")
    if hardware.flops_per_second is not None:
        seconds = (compute.flops + compute.recomputed_flops) / hardware.flops_per_second
        hours = "?" if estimate.hours is None else f"{estimate.hours:,.1f} h"
        name = f"time at {hardware.tflops:,.4g} TFLOP/s per device"
        table.add_row(name, f"{seconds:,.2f} s", hours)
    yield table


def _verdict(estimate: TrainingEstimate, suggestions: Sequence[Suggestion]) -> Iterator[str]:
    """Whether the recipe fits, the largest item, and the suggestions."""
    hardware, required, batch = estimate.setup.hardware, estimate.required, estimate.batch
    items = [item for item in required.items() if item[0] != MemoryKind.PROCESS]
    name, largest = max(items, key=lambda item: item[1])
    if hardware.memory is None:
        yield f"Each device needs {_size(required.total())} plus a margin."
    else:
        fits = "Fits" if estimate.fits else "Does not fit"
        usable = f"{_size(USABLE_FRACTION * hardware.memory)} usable of {_size(hardware.memory)}"
        yield f"{fits}: {_size(required.total())} required, {usable}."
    yield f"Largest item: {name}, {_size(largest)}."
    if estimate.adapter_size is not None:
        yield f"The adapter adds {_size(estimate.adapter_size)} to a server with the base model."
    times = f", {batch.micro_batches} micro-batches per step" if batch.micro_batches > 1 else ""
    yield f"Micro-batch per device: {batch.rows} x {batch.length} tokens{times}."
    if estimate.fits is False and not suggestions:
        yield "No tested change makes it fit: use more or larger devices, or shorter samples."
    for number, suggestion in enumerate(suggestions):
        lead = "  or" if number else "Fits with"
        yield f"{lead:<9} {suggestion.change}   ({_size(suggestion.total)})"
    if hardware.name is not None:
        yield f"The time assumes {DEFAULT_MFU:.0%} MFU; measure it and give --tflops."
    if estimate.compute.steps is None:
        yield "The steps per epoch depend on the data: pass --samples or --statistics."


def _as_json(estimate: TrainingEstimate, suggestions: Sequence[Suggestion]) -> dict[str, Any]:
    """All figures of an estimate; sizes in bytes."""
    hardware = estimate.setup.hardware
    return {
        "model": estimate.recipe.model,
        "stage": estimate.recipe.stage,
        "devices": hardware.devices,
        "device_memory": hardware.memory,
        "sharding": estimate.setup.sharding,
        "gradient_checkpointing": estimate.recipe.gradient_checkpointing,
        "parameters": estimate.trainable.sizes,
        "trainable": estimate.trainable.trainable_sizes,
        "micro_batch": asdict(estimate.batch),
        "memory": [
            {"sharding": sharding, "gradient_checkpointing": mode, "total": memory.total()}
            | {"breakdown": memory}
            for (sharding, mode), memory in estimate.memory.items()
        ],
        "total": estimate.required.total(),
        "adapter_size": estimate.adapter_size,
        "fits": estimate.fits,
        "suggestions": [asdict(suggestion) for suggestion in suggestions],
        "compute": asdict(estimate.compute),
        "run_flops": estimate.compute.run_flops,
        "hours": estimate.hours,
    }


def _unit(size: float) -> tuple[int, str]:
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def _size(size: float) -> str:
    unit, name = _unit(size)
    return f"{size / unit:,.1f} {name}"
