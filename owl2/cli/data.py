"""`owl2 data`: convert, check and look at data."""

import os
from pathlib import Path
from typing import Annotated

import typer

from owl2.errors import InputError

app = typer.Typer(help="Convert, check and look at data.", no_args_is_help=True)


def _print_public_data(wanted: bool) -> None:
    if wanted:
        from owl2.data.convert import listing

        print(listing(), end="")
        raise typer.Exit


@app.command("convert")
def convert_data(
    name: Annotated[str, typer.Argument(help="A public data set; --list shows all.")],
    source: Annotated[Path, typer.Argument(help="The folder with the published files.")],
    out: Annotated[Path, typer.Argument(help="What to write: .jsonl; for shards .yaml.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTION=VALUE]...",
            help="The data set's options, such as split=train; check_images=DIR looks for them.",
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


@app.command("check")
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
    images: Annotated[bool, typer.Option(help="Open them: broken ones show only so.")] = True,
    fetch: Annotated[bool, typer.Option(help="Also images behind http(s) URLs.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="To tell the padding of.")] = None,
) -> None:
    """Look at all samples before training does: what is bad, how long, how many images.

    Exit code 0: no row is bad; 1: some are; 130: stopped by Ctrl-C.
    """
    from owl2.data.open_dataset import open_dataset, open_from_cli
    from owl2.data.validate.command import check, limit_of, named
    from owl2.data.validate.validator import Rules
    from owl2.processing.processor import Owl2Processor

    if Path(source).suffix.lower() in (".yaml", ".yml"):
        from owl2.train.recipe_file import read_recipe

        recipe = read_recipe(source, settings or [])
        entries = [*recipe.data, *(recipe.validation.data if recipe.validation else [])]
        sources = named((entry.title, open_dataset(**entry.origin())) for entry in entries)
        model, max_length = model or recipe.model, max_length or recipe.max_length
        batch_size = batch_size or recipe.batch_size // recipe.gradient_accumulation_steps
    elif model is None:
        raise InputError("Give --model DIR: its processor says how many tokens a sample has.")
    else:
        sources = named([(source, open_from_cli(source, settings or []))])
    findings = check(
        sources,
        Owl2Processor.from_pretrained(model),
        Rules(limit_of(model, max_length), images, fetch),
        workers=workers or os.cpu_count() or 1,
        batch_size=batch_size or 8,
        output=output,
    )
    raise typer.Exit(130 if not findings.finished else int(findings.all.bad.total() > 0))


@app.command("show")
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
        Path | None, typer.Option(help="Write a page with the images to this file instead.")
    ] = None,
) -> None:
    """Print samples as the model gets them; what is learned is green, or in ⟦brackets⟧."""
    from owl2.data.show import show

    drawn = seed if random else None
    show(model, source, settings or [], count, start=start, seed=drawn, html=html)
