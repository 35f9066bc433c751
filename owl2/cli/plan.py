"""`owl2 plan`: estimates of a recipe's memory, FLOPs and time."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from owl2.cli.options import Overrides, Recipe


def plan(
    recipe: Recipe,
    settings: Overrides = None,
    gpus: Annotated[int, typer.Option(min=0, help="Number of GPUs; 0: the CPU.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="GPU model: h200, h100, a100, l40s, rtx4090 ...")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory per GPU, such as 80G; default for the CPU: what is available."),
    ] = None,
    sharding: Annotated[str, typer.Option(help="none, fsdp2 or zero3.")] = "none",
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Measured speed in TFLOP/s per GPU; default: 40% of the peak."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Mean tokens per sample; default: max_length.")
    ] = None,
    images: Annotated[float, typer.Option(min=0, help="Mean images per sample.")] = 1.0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per epoch; default: counted.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="statistics.json of `owl2 data check`; replaces --tokens, --images and --samples."
        ),
    ] = None,
    config_from: Annotated[
        str | None,
        typer.Option(help="Checkpoint with the same sizes, if the model does not exist."),
    ] = None,
    output_file: Annotated[Path | None, typer.Option(help="JSON file with all values.")] = None,
) -> None:
    """Estimate a recipe's memory, FLOPs and time. Loads no weights."""
    from owl2.memory import available_memory
    from owl2.train.estimate.command import plan_recipe, read_statistics
    from owl2.train.estimate.hardware import Hardware
    from owl2.train.estimate.memory import SampleStatistics
    from owl2.train.recipe_file import read_recipe

    chosen = read_recipe(recipe, settings or [])
    if not gpus and gpu_memory is None:
        gpu_memory = str(available_memory())
    data = SampleStatistics(tokens, images, samples)
    if statistics is not None:
        data = read_statistics(statistics, chosen.max_length)
    plan_recipe(
        chosen,
        Hardware.from_options(gpus, gpu, gpu_memory, tflops),
        Console(),
        sharding=sharding,
        data=data,
        config_from=config_from,
        output_file=output_file,
    )
