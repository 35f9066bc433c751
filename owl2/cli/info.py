"""`owl2 info`: the parts of a model and their sizes."""

from typing import Annotated

import typer
from rich.console import Console


def info(
    model: Annotated[
        str | None, typer.Argument(help="A directory or hub id; default: the released sizes.")
    ] = None,
) -> None:
    """Show a model's parts and how large they are, without loading its weights."""
    from owl2.model.parameter_counts import describe

    Console().print(describe(model))
