"""Commands that make a model and tell of it: init, info, plan, train, merge."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()


@app.command("init")
def init_model(
    llm: Annotated[str, typer.Option(help="A LLaMA: directory, hub id, .gguf file, or 'fresh'.")],
    vision: Annotated[str, typer.Option(help="A CLIP tower: directory, hub id, or 'fresh'.")],
    output: Annotated[Path, typer.Option(help="Directory for the untrained model.")],
    sizes: Annotated[Path | None, typer.Option(help="YAML: sizes of what is fresh.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels an edge.")] = None,
    mam: Annotated[bool, typer.Option(help="Weights a modality; without: one set.")] = True,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja, for another format.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything fresh.")] = 0,
) -> None:
    """Put a LLaMA and a vision tower together: an untrained model for stage 1."""
    from owl2.train.init_model import init_checkpoint

    model = init_checkpoint(
        llm,
        vision,
        output,
        sizes=sizes,
        image_size=image_size,
        use_mam=mam,
        chat_template=chat_template,
        dtype=dtype,
        seed=seed,
    )
    print(f"{model.num_parameters():,} parameters, untrained; the model is in {output}")


@app.command("info")
def show_info(
    model: Annotated[
        str | None, typer.Argument(help="A directory or hub id; default: the released sizes.")
    ] = None,
) -> None:
    """Show a model's parts and how large they are, without loading its weights."""
    from owl2.model.parameter_counts import describe

    Console().print(describe(model))


@app.command("plan")
def plan_training(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Over the recipe's own.", show_default=False),
    ] = None,
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


@app.command("train")
def train_model(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Over the recipe's own, such as learning_rate=1e-4 or data.0.count=100.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train as a recipe says; the same command goes on with a run that was stopped.

    On several GPUs: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m owl2 train ...
    """
    from owl2.train.distributed import Team
    from owl2.train.recipe_file import read_recipe
    from owl2.train.run import train

    with Team.gathered() as team:
        with team.together():
            chosen = read_recipe(recipe, settings or [])
        result = train(chosen)
    if result.finished:
        said = f"{result.steps} steps in {result.seconds:.0f} s; the model is in {result.model}"
    else:
        said = f"stopped after step {result.step} of {result.steps}; the same command goes on"
    if team.first:
        print(said)
    if not result.finished:
        raise typer.Exit(128 + result.signal)


@app.command("merge")
def merge_adapter(
    adapter: Annotated[str, typer.Argument(help="What training with an adapter left.")],
    output: Annotated[Path, typer.Option(help="Directory for the plain checkpoint.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not where the adapter says.")
    ] = None,
) -> None:
    """Make one plain checkpoint of an adapter and its base model."""
    from owl2.train.adapters import merge

    print(f"the merged model is in {merge(adapter, output, dtype, base)}")
