"""A plan for people (tables, a verdict in words) and for programs (JSON)."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from owl2.train.estimate.advice import Advice
from owl2.train.estimate.estimate import Plan
from owl2.train.estimate.hardware import GIB, MIB, REACHED, USABLE
from owl2.train.estimate.memory import Sharding
from owl2.train.recipe import Checkpointing

AGAIN: dict[Checkpointing, str] = {True: "", "selective": "selective ", False: "no "}


def show(console: Console, plan: Plan, origin: str, advice: list[Advice]) -> None:
    """Print a plan.

    Args:
        origin: where the model's sizes are from.
    """
    console.print(_parts_table(plan, origin))
    console.print()
    console.print(_memory_table(plan))
    console.print()
    console.print(_work_table(plan))
    console.print()
    for line in verdict(plan, advice):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _parts_table(plan: Plan, origin: str) -> Table:
    table = _table(f"Parameters ({origin})", "part", "all", "trained")
    trained = plan.trained
    for part, size in trained.sizes.items():
        table.add_row(str(part), f"{size:,}", f"{trained.trained_sizes[part]:,}")
    table.add_section()
    total = trained.trainable_size + trained.frozen_size
    table.add_row("all", f"{total:,}", f"{trained.trainable_size:,}")
    return table


def _memory_table(plan: Plan) -> Table:
    titles = {
        key: f"{'whole' if way is Sharding.NONE else way}, {AGAIN[again]}checkpointing"
        for key in plan.memory
        for way, again in [key]
    }
    chosen = (plan.setting.sharding, plan.recipe.gradient_checkpointing)
    titles[chosen] = f"[bold]{titles[chosen]} ◄[/bold]"
    largest = max(memory.total for memory in plan.memory.values())
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    title = f"Memory of each of {plan.setting.machine.title}, in {name}"
    table = _table(title, "", *titles.values())
    pieces = [memory.pieces() for memory in plan.memory.values()]
    for piece in pieces[0]:
        if any(column[piece] for column in pieces):
            table.add_row(piece, *(f"{column[piece] / unit:,.2f}" for column in pieces))
    table.add_section()
    totals = (memory.total / unit for memory in plan.memory.values())
    table.add_row("at its largest", *(f"{total:,.2f}" for total in totals))
    return table


def _work_table(plan: Plan) -> Table:
    work, steps = plan.work, plan.work.steps
    table = _table("Work", "", "a step", "the run" + (f" ({steps:,} steps)" if steps else ""))
    rows: list[tuple[str, float]] = [
        ("samples", work.samples),
        ("images", work.images),
        ("text tokens", work.text_tokens),
        ("image tokens", work.image_tokens),
    ]
    for name, count in rows:
        table.add_row(name, f"{count:,.0f}", f"{count * steps:,.0f}" if steps else "?")
    flops = [
        ("FLOPs, forward and backward", work.flops),
        ("FLOPs, computed again", work.recomputed),
    ]
    for name, count in flops:
        table.add_row(name, f"{count:.3g}", f"{count * steps:.3g}" if steps else "?")
    if plan.setting.machine.speed is not None:
        seconds = (work.flops + work.recomputed) / plan.setting.machine.speed
        hours = "?" if plan.hours is None else f"{plan.hours:,.1f} h"
        speed = f"time at {plan.setting.machine.tflops:,.4g} TFLOP/s a device"
        table.add_row(speed, f"{seconds:,.2f} s", hours)
    return table


def verdict(plan: Plan, advice: list[Advice]) -> Iterator[str]:
    """Whether it fits, what takes most, and what to change."""
    machine, need, batch = plan.setting.machine, plan.need, plan.batch
    name, most = max(need.pieces().items(), key=lambda piece: piece[1])
    if machine.memory is None:
        yield f"A device needs {_size(need.total)}, and some to spare."
    else:
        how = "Fits" if plan.fits else "Does not fit"
        usable = f"{_size(USABLE * machine.memory)} usable of {_size(machine.memory)}"
        yield f"{how}: {_size(need.total)} are needed, {usable}."
    yield f"The largest piece: {name}, {_size(most)}."
    times = f", {batch.passes} times a step" if batch.passes > 1 else ""
    yield f"A device computes {batch.rows} x {batch.length} tokens at a time{times}."
    if plan.fits is False and not advice:
        yield "Nothing that was tried makes it fit: take more or larger devices or shorter samples."
    for number, piece in enumerate(advice):
        lead = "  or" if number else "Fits with"
        yield f"{lead:<9} {piece.change}   ({_size(piece.total)})"
    if machine.name is not None:
        yield f"The time supposes {REACHED:.0%} of the GPU's peak; measure, and give --tflops."
    if plan.work.steps is None:
        yield "How many steps an epoch has hangs on the data: give --samples or --statistics."


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def as_json(plan: Plan, advice: list[Advice]) -> dict[str, Any]:
    """All numbers of a plan; sizes in bytes."""
    work, machine = plan.work, plan.setting.machine
    return {
        "model": plan.recipe.model,
        "stage": plan.recipe.stage,
        "devices": machine.devices,
        "device_memory": machine.memory,
        "sharding": str(plan.setting.sharding),
        "gradient_checkpointing": plan.recipe.gradient_checkpointing,
        "parameters": {str(part): size for part, size in plan.trained.sizes.items()},
        "trained": {str(part): size for part, size in plan.trained.trained_sizes.items()},
        "at_a_time": {
            "rows": plan.batch.rows,
            "length": plan.batch.length,
            "images": plan.batch.images,
            "times_a_step": plan.batch.passes,
        },
        "memory": [
            {"sharding": str(way), "gradient_checkpointing": again, "total": memory.total}
            | {"pieces": memory.pieces()}
            for (way, again), memory in plan.memory.items()
        ],
        "total": plan.need.total,
        "fits": plan.fits,
        "advice": [{"change": piece.change, "total": piece.total} for piece in advice],
        "step": {
            "samples": work.samples,
            "images": work.images,
            "text_tokens": work.text_tokens,
            "image_tokens": work.image_tokens,
            "flops": work.flops,
            "recomputed_flops": work.recomputed,
        },
        "steps": work.steps,
        "run_flops": work.run_flops,
        "hours": plan.hours,
    }


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
