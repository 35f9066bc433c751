"""`owl2 train`: train as a recipe says."""

import typer

from owl2.cli.options import Overrides, Recipe


def train(
    recipe: Recipe,
    settings: Overrides = None,
) -> None:
    """Train as a recipe says; the same command goes on with a run that was stopped.

    On several GPUs: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m owl2 train ...
    """
    from owl2.train.distributed import Team
    from owl2.train.recipe_file import read_recipe
    from owl2.train.run import train as run_train

    with Team.gathered() as team:
        with team.together():
            chosen = read_recipe(recipe, settings or [])
        result = run_train(chosen)
    if result.finished:
        said = f"{result.steps} steps in {result.seconds:.0f} s; the model is in {result.model}"
    else:
        said = f"stopped after step {result.step} of {result.steps}; the same command goes on"
    if team.first:
        print(said)
    if not result.finished:
        raise typer.Exit(128 + result.signal)
