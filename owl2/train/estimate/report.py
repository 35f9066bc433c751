"""An estimate as tables with a verdict, and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from owl2.train.estimate.estimate import Suggestion, TrainingEstimate
from owl2.train.estimate.hardware import DEFAULT_MFU, GIB, MIB, USABLE_FRACTION
from owl2.train.estimate.memory import Sharding
from owl2.train.estimate.tracer import MemoryKind
from owl2.train.recipe import Checkpointing

CHECKPOINTING: dict[Checkpointing, str] = {True: "", "selective": "selective ", False: "no "}


def show(
    console: Console, estimate: TrainingEstimate, origin: str, suggestions: Sequence[Suggestion]
) -> None:
    """Print an estimate; `origin`: the origin of the model's sizes."""
    for table in (_parameters(estimate, origin), _memory(estimate), _compute(estimate)):
        console.print(table)
        console.print()
    for line in verdict(estimate, suggestions):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _parameters(estimate: TrainingEstimate, origin: str) -> Table:
    table = _table(f"Parameters ({origin})", "part", "all", "trainable")
    params = estimate.trainable
    for part, size in params.sizes.items():
        table.add_row(str(part), f"{size:,}", f"{params.trainable_sizes[part]:,}")
    table.add_section()
    total = params.trainable_size + params.frozen_size
    table.add_row("all", f"{total:,}", f"{params.trainable_size:,}")
    return table


def _memory(estimate: TrainingEstimate) -> Table:
    chosen = (estimate.setup.sharding, estimate.recipe.gradient_checkpointing)
    titles = []
    for sharding, mode in estimate.memory:
        way = "unsharded" if sharding is Sharding.NONE else sharding
        title = f"{way}, {CHECKPOINTING[mode]}checkpointing"
        titles.append(f"[bold]{title} ◄[/bold]" if (sharding, mode) == chosen else title)
    unit, name = _unit(max(memory.total() for memory in estimate.memory.values()))
    title = f"Memory per device ({estimate.setup.hardware.title}), in {name}"
    table = _table(title, "", *titles)
    columns = list(estimate.memory.values())
    for kind in MemoryKind:
        if any(column[kind] for column in columns):
            table.add_row(kind, *(f"{column[kind] / unit:,.2f}" for column in columns))
    table.add_section()
    totals = (memory.total() / unit for memory in estimate.memory.values())
    table.add_row("peak", *(f"{total:,.2f}" for total in totals))
    return table


def _compute(estimate: TrainingEstimate) -> Table:
    compute, hardware = estimate.compute, estimate.setup.hardware
    steps = compute.steps
    table = _table("Computation", "", "per step", f"run ({steps:,} steps)" if steps else "run")
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
    return table


def verdict(estimate: TrainingEstimate, suggestions: Sequence[Suggestion]) -> Iterator[str]:
    """Whether the recipe fits, the largest item, and the suggestions."""
    hardware, required, batch = estimate.setup.hardware, estimate.required, estimate.batch
    name, largest = max(required.items(), key=lambda item: item[1])
    if hardware.memory is None:
        yield f"Each device needs {_size(required.total())} plus a margin."
    else:
        fits = "Fits" if estimate.fits else "Does not fit"
        usable = f"{_size(USABLE_FRACTION * hardware.memory)} usable of {_size(hardware.memory)}"
        yield f"{fits}: {_size(required.total())} required, {usable}."
    yield f"Largest item: {name}, {_size(largest)}."
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
        yield "The steps per epoch depend on the data: give --samples or --statistics."


def as_json(estimate: TrainingEstimate, suggestions: Sequence[Suggestion]) -> dict[str, Any]:
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


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
