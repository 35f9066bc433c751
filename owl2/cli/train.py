"""`owl2 train`: train according to a recipe, or resume an earlier run."""

import typer

from owl2.cli.options import Overrides, Recipe


def train(recipe: Recipe, settings: Overrides = None) -> None:
    """Train according to a recipe. The same command resumes a run that was stopped.

    On several GPUs: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m owl2 train ...
    """
    from owl2.train.run import train as train_recipe

    result = train_recipe(recipe, overrides=settings or [])
    if not result.finished:
        raise typer.Exit(128 + result.signal)
