"""`owl2 data`: convert, validate and show datasets."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from owl2.cli.options import command
from owl2.errors import ErrorCode, InputError

if TYPE_CHECKING:
    from owl2.data.open_dataset import SampleDataset
    from owl2.train.recipe import Recipe

app = typer.Typer(help="Convert, validate and show datasets.", no_args_is_help=True)

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OPTION=VALUE]...",
        help="Options of the dataset, such as split=train, or images=DIR for a file.",
        show_default=False,
    ),
]

Source = Annotated[
    str,
    typer.Argument(
        help="A recipe (all of its data), a file, shards, a directory from save_to_disk, or "
        "the name of a dataset."
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Checkpoint whose processor is used; default: the recipe's model."
    ),
]


def _open_datasets(
    source: str, settings: list[str]
) -> "tuple[dict[str, SampleDataset], Recipe | None]":
    """The datasets of a recipe by name, with the recipe; or one dataset."""
    from owl2.data.open_dataset import open_dataset, open_from_cli, unique_names

    if Path(source).suffix.lower() not in (".yaml", ".yml"):
        return {source: open_from_cli(source, settings)}, None
    from owl2.train.recipe_file import read_recipe

    recipe = read_recipe(source, settings)
    entries = [*recipe.data, *(recipe.validation.data if recipe.validation else [])]
    return unique_names((e.title, open_dataset(**e.origin())) for e in entries), recipe


def _require_model(model: str | None, recipe: "Recipe | None") -> str:
    model = model or (recipe.model if recipe else None)
    if model is None:
        raise InputError(
            "--model is required: its processor encodes the samples", ErrorCode.MISSING_VALUE
        )
    return model


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
    source: Source,
    settings: Settings = None,
    model: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the invalid samples and the statistics.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum tokens; default: the recipe's, else the context."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default and maximum: one per CPU.")
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
    from owl2.data.validate.command import effective_max_length, validate_datasets
    from owl2.data.validate.validator import SampleValidator
    from owl2.processing.processor import Owl2Processor

    datasets, recipe = _open_datasets(source, settings or [])
    if recipe is not None:
        max_length = max_length or recipe.max_length
        batch_size = batch_size or recipe.batch_size // recipe.gradient_accumulation_steps
    model = _require_model(model, recipe)
    options = recipe.processor_options() if recipe else {"image_newline": True}
    processor = Owl2Processor.from_pretrained(model, **options)
    validator = SampleValidator(
        processor,
        effective_max_length(model, max_length),
        check_images,
        fetch_urls,
        recipe.score_labels(processor) if recipe else None,
    )
    # As in torch, which warns of more processes than CPUs.
    affinity = getattr(os, "sched_getaffinity", None)
    num_cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    report = validate_datasets(
        datasets,
        validator,
        num_workers=min(workers or num_cpus, num_cpus),
        batch_size=batch_size or 8,
        output=output,
    )
    raise typer.Exit(130 if not report.finished else int(report.total.invalid.total() > 0))


@app.command("show")
@command
def show_data(
    source: Source,
    settings: Settings = None,
    model: CheckpointOption = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples of each dataset.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="Number of the first sample, from 0.")] = 0,
    random: Annotated[bool, typer.Option("--random", help="Show random samples.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed for --random.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the images to this file instead.")
    ] = None,
) -> None:
    """Print samples as the model reads them; tokens with a label are green or in ⟦brackets⟧."""
    from owl2.data.show import show_samples

    datasets, recipe = _open_datasets(source, settings or [])
    show_samples(
        _require_model(model, recipe),
        datasets,
        count,
        chat_template=recipe.chat_template if recipe else None,
        start=start,
        seed=seed if random else None,
        html=html,
    )
