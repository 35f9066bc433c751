"""`owl2 plan`: estimates of a recipe's memory, FLOPs and time."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from owl2.cli.options import Overrides, Recipe


def plan(
    recipe: Recipe,
    settings: Overrides = None,
    gpus: Annotated[int, typer.Option(min=0, help="How many; 0: the CPU.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="h200, h100, a100, l40s, rtx4090 ...: memory and speed.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Of each, such as 80G.")] = None,
    sharding: Annotated[str, typer.Option(help="none, fsdp2 or zero3.")] = "none",
    tflops: Annotated[
        float | None, typer.Option(min=1e-3, help="A GPU's, measured; default: 40% of its peak.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Mean tokens a sample; default: all have max_length.")
    ] = None,
    images: Annotated[float, typer.Option(min=0, help="Mean images a sample.")] = 1.0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of an epoch, where the recipe cannot say.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="statistics.json of `owl2 data check`: the three above.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="A checkpoint of the model's sizes, if it is not there yet.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers there, too.")
    ] = None,
) -> None:
    """Say beforehand what a recipe needs: memory, FLOPs, hours. Loads no weights."""
    from owl2.train.estimate.command import Options, plan_recipe
    from owl2.train.recipe_file import read_recipe

    options = Options(
        gpus, gpu, gpu_memory, sharding, tflops, tokens, images, samples, statistics, like
    )
    plan_recipe(read_recipe(recipe, settings or []), options, Console(), json_file)
