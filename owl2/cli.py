"""The command `owl2`: parses, calls one function a command, prints.

Importing the package registers the model with transformers, which takes seconds; each command
imports the further rooms that it needs when it runs.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from owl2 import __version__
from owl2.errors import InputError

app = typer.Typer(
    name="owl2",
    help="mPLUG-Owl2: ask about pictures, train, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"owl2 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


@app.command("version")
def show_version() -> None:
    """Say the version."""
    _print_version(True)


@app.command("chat")
def chat_with_model(
    model: Annotated[str, typer.Option(help="A checkpoint: directory or hub id.")],
    question: Annotated[
        str | None, typer.Argument(help="Ask this and end; without it: a conversation.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="A picture: file or URL. Goes before the question, or to its <|image|>."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample; 0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="The same seed, the same answer.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    image_policy: Annotated[
        str | None, typer.Option(help="resize or pad: how a picture becomes a square.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="The largest picture accepted.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="8bit or 4bit: the decoder in fewer bits, with bitsandbytes.")
    ] = None,
) -> None:
    """Ask about pictures: one question, or a conversation on the terminal."""
    from owl2.inference.chat import Settings, ask, converse
    from owl2.inference.decoding import Options

    settings = Settings(model, device, dtype, image_policy, max_pixels, quantize)
    options: Options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if question is None:
        converse(settings, image or [], options)
    else:
        ask(settings, question, image or [], options)


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
    from owl2.train.initial import init_checkpoint

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
    from owl2.model.sizes import describe

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
    pictures: Annotated[float, typer.Option(min=0, help="Mean pictures a sample.")] = 1.0,
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
    from owl2.train.plan_command import Options, plan_recipe
    from owl2.train.recipe_file import read_recipe

    options = Options(
        gpus, gpu, gpu_memory, sharding, tflops, tokens, pictures, samples, statistics, like
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
    from owl2.train.recipe_file import read_recipe
    from owl2.train.run import train
    from owl2.train.team import Team

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


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Option(help="A checkpoint: directory or hub id.")],
    tasks: Annotated[str, typer.Option(help="Names, separated by commas: easy_vqa.")],
    output: Annotated[Path, typer.Option(help="Directory for results.json and the answers.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 128,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many questions of each task.")
    ] = None,
    blind: Annotated[bool, typer.Option(help="Ask the same without the picture, too.")] = True,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Words with {question} in them, or 'short' for the question alone; what the model "
            "was trained with. Default: the task's own."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Ask the questions of a task and score the answers."""
    from owl2.eval.runner import Settings, evaluate

    evaluate(Settings(model, tasks, output, batch_size, limit, blind, prompt, device, dtype))


data_app = typer.Typer(help="Convert, check and look at data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def _print_public_data(wanted: bool) -> None:
    if wanted:
        from owl2.data.convert import listing

        print(listing(), end="")
        raise typer.Exit


@data_app.command("convert")
def convert_data(
    name: Annotated[str, typer.Argument(help="A public data set; --list shows all.")],
    source: Annotated[Path, typer.Argument(help="The folder with the published files.")],
    out: Annotated[Path, typer.Argument(help="What to write: .jsonl; for shards .yaml.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTION=VALUE]...",
            help="The data set's options, such as split=train; check_pictures=DIR looks for them.",
            show_default=False,
        ),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option(
            "--list", callback=_print_public_data, is_eager=True, help="Show what is known."
        ),
    ] = False,
) -> None:
    """Turn the published files of a public data set into samples to train on."""
    from owl2.data.convert import convert

    convert(name, source, out, settings or [])


@data_app.command("check")
def check_data(
    source: Annotated[
        str, typer.Argument(help="A recipe (all its data), a file, shards, a table, or a dataset.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTION=VALUE]...",
            help="The source's options; for a recipe KEY=VALUE over its own.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint; default: the recipe's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for bad rows, statistics.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Default: recipe, context.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    pictures: Annotated[bool, typer.Option(help="Open them: broken ones show only so.")] = True,
    fetch: Annotated[bool, typer.Option(help="Also pictures behind http(s) URLs.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="To tell the padding of.")] = None,
) -> None:
    """Look at all samples before training does: what is bad, how long, how many pictures.

    Exit code 0: no row is bad; 1: some are; 130: stopped by Ctrl-C.
    """
    from owl2.data.check import check, limit_of, named
    from owl2.data.looking import Rules
    from owl2.data.sources import open_source, open_words
    from owl2.processing.processor import Owl2Processor

    if Path(source).suffix.lower() in (".yaml", ".yml"):
        from owl2.train.recipe_file import read_recipe

        recipe = read_recipe(source, settings or [])
        entries = [*recipe.data, *(recipe.validation.data if recipe.validation else [])]
        sources = named((entry.title, open_source(**entry.origin())) for entry in entries)
        model, max_length = model or recipe.model, max_length or recipe.max_length
        batch_size = batch_size or recipe.batch_size // recipe.gradient_accumulation
    elif model is None:
        raise InputError("Give --model DIR: its processor says how many tokens a sample has.")
    else:
        sources = named([(source, open_words(source, settings or []))])
    findings = check(
        sources,
        Owl2Processor.from_pretrained(model),
        Rules(limit_of(model, max_length), pictures, fetch),
        workers=workers or os.cpu_count() or 1,
        batch_size=batch_size or 8,
        output=output,
    )
    raise typer.Exit(130 if not findings.finished else int(findings.all.bad.total() > 0))


@data_app.command("show")
def show_data(
    model: Annotated[str, typer.Option(help="A checkpoint, whose processor is used.")],
    source: Annotated[str, typer.Argument(help="A file, shards, a table, or a dataset.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTION=VALUE]...",
            help="The source's options, such as split=train, or images=DIR of a file.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="From this one on, the first being 0.")] = 0,
    random: Annotated[bool, typer.Option("--random", help="Drawn from all of them.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of --random.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the pictures to this file instead.")
    ] = None,
) -> None:
    """Print samples as the model gets them; what is learned is green, or in ⟦brackets⟧."""
    from owl2.data.show import show

    drawn = seed if random else None
    show(model, source, settings or [], count, start=start, seed=drawn, html=html)


def main() -> None:
    """Run the command line.

    It ends with exit code 0, with 2 where the user's input was wrong (then the last line on stderr
    says what), with 130 on Ctrl-C and, from `owl2 train`, 143 on SIGTERM; Ctrl-C elsewhere and
    wrong usage are typer's own doing.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a bar in a log file is no help
    # Where it is installed, it is imported in every training and advises of further packages.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="owl2")
    except InputError as error:
        _complain(str(error))
        sys.exit(2)


def _complain(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)
