"""`owl2 data`: convert, validate and show datasets."""

import os
from pathlib import Path
from typing import Annotated

import typer

from owl2.cli.options import command
from owl2.errors import ErrorCode, InputError

app = typer.Typer(help="Convert, validate and show datasets.", no_args_is_help=True)

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OPTION=VALUE]...",
        help="Options of the dataset, such as split=train, or images=DIR for a file.",
        show_default=False,
    ),
]


def _print_datasets(wanted: bool) -> None:
    if wanted:
        from owl2.data.convert import listing

        print(listing(), end="")
        raise typer.Exit


@app.command("convert")
@command
def convert_data(
    name: Annotated[str, typer.Argument(help="Name of a public dataset; see --list.")],
    source: Annotated[Path, typer.Argument(help="Directory with the published files.")],
    out: Annotated[Path, typer.Argument(help="Output file: .jsonl, or .yaml for shards.")],
    settings: Settings = None,
    list_: Annotated[
        bool,
        typer.Option("--list", callback=_print_datasets, is_eager=True, help="List the datasets."),
    ] = False,
) -> None:
    """Convert the published files of a public dataset to training data.

    The option check_images=DIR checks that the images exist.
    """
    from owl2.data.convert import convert_dataset

    convert_dataset(name, source, out, settings or [])


@app.command("check")
@command
def check_data(
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe (all of its data), a file, shards, a directory from save_to_disk, or "
            "the name of a dataset."
        ),
    ],
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: the recipe's.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the invalid samples and the statistics.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum tokens; default: the recipe's, else the context."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per core.")
    ] = None,
    check_images: Annotated[bool, typer.Option(help="Open the images to find broken ones.")] = True,
    fetch_urls: Annotated[bool, typer.Option(help="Also open images behind http(s) URLs.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Batch size for the padding estimate.")
    ] = None,
) -> None:
    """Validate all samples before training, and print statistics. A recipe's options are KEY=VALUE.

    Exit code 0: all samples are valid; 1: some are not; 130: stopped by Ctrl-C.
    """
    from owl2.data.open_dataset import open_dataset, open_from_cli
    from owl2.data.validate.command import effective_max_length, unique_names, validate_datasets
    from owl2.data.validate.validator import SampleValidator
    from owl2.processing.processor import Owl2Processor

    template = None
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        from owl2.train.recipe_file import read_recipe

        recipe = read_recipe(source, settings or [])
        entries = [*recipe.data, *(recipe.validation.data if recipe.validation else [])]
        datasets = unique_names((entry.title, open_dataset(**entry.origin())) for entry in entries)
        model, max_length = model or recipe.model, max_length or recipe.max_length
        template = recipe.chat_template
        batch_size = batch_size or recipe.batch_size // recipe.gradient_accumulation_steps
    elif model is None:
        raise InputError(
            "--model is required: its processor encodes the samples", ErrorCode.MISSING_VALUE
        )
    else:
        datasets = unique_names([(source, open_from_cli(source, settings or []))])
    validator = SampleValidator(
        Owl2Processor.from_pretrained(model, chat_template=template, image_newline=True),
        effective_max_length(model, max_length),
        check_images,
        fetch_urls,
    )
    report = validate_datasets(
        datasets,
        validator,
        num_workers=workers or os.cpu_count() or 1,
        batch_size=batch_size or 8,
        output=output,
    )
    raise typer.Exit(130 if not report.finished else int(report.total.invalid.total() > 0))


@app.command("show")
@command
def show_data(
    model: Annotated[str, typer.Option(help="Checkpoint whose processor is used.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A file, shards, a directory from save_to_disk, or the name of a dataset."
        ),
    ],
    settings: Settings = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="Number of the first sample, from 0.")] = 0,
    random: Annotated[bool, typer.Option("--random", help="Show random samples.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed for --random.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the images to this file instead.")
    ] = None,
) -> None:
    """Print samples as the model reads them; tokens with a label are green or in ⟦brackets⟧."""
    from owl2.data.show import show_samples

    show_samples(
        model,
        source,
        settings or [],
        count,
        start=start,
        seed=seed if random else None,
        html=html,
    )
